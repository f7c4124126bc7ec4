"""Text to tokens and back, with the tokenizer's file alone."""

from __future__ import annotations

import json
from pathlib import Path


class Texts:
    """A tokenizer, and what surrounds a request.

    Args:
        folder: with ``tokenizer.json`` and ``frame.json``.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._frame = json.loads((folder / "frame.json").read_text(encoding="utf-8"))

    def ids(self, text: bytes | str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: UTF-8.
            chat: it is a request of one user turn; else it is taken as it stands, with what the
                model wants before every text.

        Raises:
            ValueError: not UTF-8, or empty.
        """
        try:
            whole = text if isinstance(text, str) else text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text_input is not UTF-8: {error}.") from error
        if not whole:
            raise ValueError("text_input is empty.")
        if chat:
            framed = f"{self._frame['before']}{whole}{self._frame['after']}"
            return [*self._frame["chat_opening"], *self._encoded(framed)]
        opening, ids = self._frame["opening"], self._encoded(whole)
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
