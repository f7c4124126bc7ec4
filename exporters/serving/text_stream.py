"""Text of tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Gives out text as soon as later tokens cannot change it.

    What is held back: bytes of a character that is not complete, and text that may be the
    beginning of a stop string. Only the last tokens are decoded at each step, with a few
    before them, since the text of a token depends on what it follows.

    Args:
        decode: token ids to text, without special tokens.
        stop: strings that end the text; they are not part of it. The one that is complete first
            counts, of several that one token completes the one that begins first.

    Attributes:
        tokens: all tokens that were added.
        text: all text that was given out.
        stopped: whether a stop string was met; further tokens add nothing.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = [each for each in stop if each]
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._held = ""
        # Tokens from the first on are decoded; the text of those before the second is out.
        self._from, self._upto = 0, 0

    def add(self, token: int) -> str:
        """The text that a further token lets out."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        return self._out(self._decoded(final=False))

    def rest(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        out = self._out(self._decoded(final=True)) + self._held
        if not self.stopped:
            self.text += self._held
        self._held = ""
        return out

    def _decoded(self, *, final: bool) -> str:
        known = self.decode(self.tokens[self._from : self._upto])
        whole = self.decode(self.tokens[self._from :])
        if not final and (whole.endswith(_UNFINISHED) or len(whole) <= len(known)):
            return ""
        self._from, self._upto = self._upto, len(self.tokens)
        return whole[len(known) :]

    def _out(self, new: str) -> str:
        self._held += new
        found = [at for at in (self._held.find(each) for each in self.stop) if at >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            kept = max((_begun(self._held, each) for each in self.stop), default=0)
            cut = len(self._held) - kept
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
