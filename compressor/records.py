"""Records from every source a recipe can name: files, embedded prompts, named sets, the hub.

A record is one value of the source, not yet looked into; `mskip.compressor.data`
turns it into a conversation. Every source is read as far as its records are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from mskip.compressor import catalog
from mskip.compressor.catalog import HubSet
from mskip.compressor.errors import DataError

Records = Iterator[tuple[str, object]]

_EMBEDDED = "embedded:"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_BLANK = re.compile(r"[ \t\r\n]*")  # JSON's own whitespace, nothing wider
_CHUNK = 1 << 16  # characters of a JSON list that are read at a time


def read_records(
    source: str, split: str, trust_remote_code: bool, *, shuffle_buffer: int = 0, seed: int = 0
) -> Records:
    """Yield (where, record) of ``source``, without reading further than is asked for.

    Args:
        source: "embedded:prompts", a short name of `mskip.compressor.catalog`, a .jsonl,
            .json or .txt file, or a hub data set id; looked for in this order.
        split: the split of a hub data set; files have none.
        trust_remote_code: as in `mskip.compressor.data.read_conversations`.
        shuffle_buffer: as in `catalog.shuffled`; 0 keeps the source's own order.
        seed: of the shuffle, and of the draws from a mixture.

    Yields:
        where: how an error names the record, "path:line" or "id row number" (from 1).
        record: the JSON value; ``{"text": ...}`` for a document of a .txt file.

    Raises:
        DataError: missing, unreadable or malformed; raised while iterating, too.
        ValueError: a negative ``shuffle_buffer``.
    """
    records = _records(source, split, trust_remote_code, seed)
    return catalog.shuffled(records, shuffle_buffer, seed) if shuffle_buffer else records


def _records(source: str, split: str, trust_remote_code: bool, seed: int) -> Records:
    if source.startswith(_EMBEDDED):
        if source != f"{_EMBEDDED}prompts":
            raise DataError(f"no embedded data {source!r}.", "There is 'embedded:prompts'.")
        return _file(resources.files("mskip.recipes") / "prompts.jsonl", source, _json_lines)
    path = Path(source)
    if source in catalog.names():
        if path.is_file():
            raise DataError(
                f"{source!r} is a named data set, and a file here has this name.",
                "Rename the file (data files end in .jsonl, .json or .txt) or run elsewhere.",
            )
        parts = catalog.parts_of(source)
        streams = [(_hub_set(part, split, trust_remote_code), weight) for part, weight in parts]
        return catalog.interleave(streams, seed)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        return _file(path, source, reader)
    if not _HUB_ID.fullmatch(source) or path.is_file():
        raise DataError(f"{source!r} is neither a data file nor a hub data set id.", _SOURCES_HELP)
    return _hub(source, split, trust_remote_code)


# -- files ------------------------------------------------------------------------------------


def _file(file: Traversable, name: str, reader: Callable[[IO[str], str], Records]) -> Records:
    """Read text (UTF-8, with or without a byte order mark); faults become DataError."""
    try:
        with file.open("r", encoding="utf-8-sig") as stream:
            yield from reader(stream, name)
    except FileNotFoundError:
        raise DataError(f"no data file at {name}.", _SOURCES_HELP) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}.", "Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}.") from error


def _json_lines(stream: IO[str], name: str) -> Records:
    # Not splitlines(): it also splits at U+2028 and its like, which JSON strings may hold.
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise _malformed(f"{name}:{number}", reason, "one object a line") from error
        yield f"{name}:{number}", record


class _Window:
    """The part of a JSON text that is being read: grows at its end, forgets what is done."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text = ""
        self._position = self._counted = 0
        self._line = 1
        self._decoder = json.JSONDecoder()

    def line(self, position: int | None = None) -> int:
        """Number of the line (from 1) at ``position``, by default the current one."""
        position = self._position if position is None else position
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            if match := _BLANK.match(self._text, self._position):
                self._position = match.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._grow():
                return ""

    def skip(self) -> None:
        """Go past one character."""
        self._position += 1

    def value(self) -> object:
        """The JSON value that begins here.

        Raises:
            json.JSONDecodeError: its ``pos`` is good for `line`.
            ValueError, RecursionError: out of Python's limits.
        """
        while True:
            fault: json.JSONDecodeError | None = None
            value, end = None, len(self._text)
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                fault = error
            # Cut off by the window's end, the rest may mend a fault or lengthen a number.
            if end == len(self._text) and self._grow():
                continue
            if fault:
                raise fault
            self._position = end
            return value

    def _grow(self) -> bool:
        # As much again as is held: a value longer than the window is tried a few times only.
        more = self._stream.read(max(_CHUNK, len(self._text) - self._position))
        if more:
            self.line()
            self._text = self._text[self._position :] + more
            self._position = self._counted = 0
        return bool(more)


def _json_list(stream: IO[str], name: str) -> Records:
    # Walked element by element: json.load would read it whole and lose the line numbers.
    wanted = "a list of objects (one object a line belongs in a .jsonl file)"
    window = _Window(stream)
    if not (first := window.peek()):
        return

    def broken(reason: str) -> DataError:
        return _malformed(f"{name}:{window.line()}", reason, wanted)

    if first != "[":
        raise broken("the file does not begin with '['")
    window.skip()
    closed = window.peek() == "]"
    while not closed:
        where = f"{name}:{window.line()}"
        try:
            record = window.value()
        except json.JSONDecodeError as error:
            raise _malformed(f"{name}:{window.line(error.pos)}", error.msg, wanted) from error
        except UnicodeDecodeError:
            raise  # a ValueError, too, but of the stream
        except (ValueError, RecursionError) as error:
            raise _malformed(where, str(error), wanted) from error
        yield where, record
        after = window.peek()
        closed = after == "]"
        if not closed:
            if after != ",":
                raise broken("expecting ',' or ']'")
            window.skip()
            window.peek()
    window.skip()
    if window.peek():
        raise broken("something follows the list")


def _malformed(where: str, reason: str, wanted: str) -> DataError:
    return DataError(f"{where}: malformed JSON: {reason}.", f"Mend the file: it holds {wanted}.")


def _documents(stream: IO[str], name: str) -> Records:
    for blank, lines in groupby(enumerate(stream, 1), key=lambda item: not item[1].strip()):
        if not blank:
            numbered = list(lines)
            text = "".join(line for _, line in numbered).rstrip("\n")
            yield f"{name}:{numbered[0][0]}", {"text": text}


_READERS: dict[str, Callable[[IO[str], str], Records]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".txt": _documents,
}

# -- the hub ----------------------------------------------------------------------------------


def _hub_set(row: HubSet, split: str, trust_remote_code: bool) -> Records:
    if split != row.split:
        raise DataError(f"{row.hub} has no split {split!r}.", f"Set data.split to {row.split}.")
    if row.file is None:
        return _hub(row.hub, split, trust_remote_code)
    return _hub_list(row.hub, row.file)


def _hub(identifier: str, split: str, trust_remote_code: bool) -> Records:
    """Rows of a hub data set, streamed by ``datasets``; offline, from the copy in its cache."""
    with _hub_faults(f"{identifier!r} (split {split!r})"):
        import inspect

        from datasets import load_dataset
        from huggingface_hub import is_offline_mode

        options: dict[str, Any] = {"split": split, "streaming": not is_offline_mode()}
        # Later versions refuse the very word, whatever its value.
        if trust_remote_code and "trust_remote_code" in inspect.signature(load_dataset).parameters:
            options["trust_remote_code"] = True
        for number, row in enumerate(load_dataset(identifier, **options), 1):
            yield f"{identifier} row {number}", row


def _hub_list(identifier: str, file: str) -> Records:
    """Elements of a JSON list in a hub data set; a copy in the hub's cache goes first."""
    name = f"{identifier}/{file}"
    with _hub_faults(repr(name)):
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        cached = try_to_load_from_cache(identifier, file, repo_type="dataset")
        with (
            Path(cached).open("r", encoding="utf-8-sig")
            if isinstance(cached, str)
            else HfFileSystem().open(f"datasets/{name}", "r", encoding="utf-8-sig")
        ) as stream:
            yield from _json_list(stream, name)


@contextmanager
def _hub_faults(what: str) -> Iterator[None]:
    """Whatever ``datasets`` and the hub raise becomes DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load the data set {what}: {cause}",
            "Check its name, its split and the network, or download it and give a .jsonl, "
            f".json or .txt file. {_NAMES_HELP}",
        ) from error


_NAMES_HELP = f"Named data sets: {', '.join(catalog.names())}."
_SOURCES_HELP = (
    "A source is embedded:prompts, a .jsonl, .json or .txt file, or a hub data set id. "
    f"{_NAMES_HELP}"
)
