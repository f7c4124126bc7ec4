"""Records from every source a recipe can name: files, the embedded prompts, the hub.

A record is one value of the source, not yet looked into; `mskip.compressor.data`
turns it into a conversation.
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

from mskip.compressor.errors import DataError

_EMBEDDED = "embedded:"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_BLANK = re.compile(r"[ \t\r\n]*")  # JSON's own whitespace, nothing wider


def read_records(source: str, split: str, trust_remote_code: bool) -> Iterator[tuple[str, object]]:
    """Yield (where, record) of ``source`` in its own order, without reading ahead.

    Args:
        source: "embedded:prompts", a .jsonl, .json or .txt file, or a hub data set id.
        split: the split of a hub data set; files have none.
        trust_remote_code: as in `mskip.compressor.data.read_conversations`.

    Yields:
        where: how an error names the record, "path:line" or "id row number" (from 1).
        record: the JSON value; ``{"text": ...}`` for a document of a .txt file.

    Raises:
        DataError: missing, unreadable or malformed; raised while iterating, too.
    """
    if source.startswith(_EMBEDDED):
        if source != f"{_EMBEDDED}prompts":
            raise DataError(f"no embedded data {source!r}.", "There is 'embedded:prompts'.")
        return _json_lines(resources.files("mskip.recipes") / "prompts.jsonl", source)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        return reader(path, source)
    if not _HUB_ID.fullmatch(source) or path.is_file():
        raise DataError(f"{source!r} is neither a data file nor a hub data set id.", _SOURCES_HELP)
    return _hub(source, split, trust_remote_code)


@contextmanager
def _opened(file: Traversable, name: str) -> Iterator[IO[str]]:
    """The file as text (UTF-8, with or without a byte order mark); faults become DataError."""
    try:
        with file.open("r", encoding="utf-8-sig") as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"no data file at {name}.", _SOURCES_HELP) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}.", "Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}.") from error


def _json_lines(file: Traversable, name: str) -> Iterator[tuple[str, object]]:
    # Not splitlines(): it also splits at U+2028 and its like, which JSON strings may hold.
    with _opened(file, name) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise _malformed(f"{name}:{number}", reason, "one object a line") from error
            yield f"{name}:{number}", record


def _json_list(file: Traversable, name: str) -> Iterator[tuple[str, object]]:
    # Walked element by element, since json.loads of the whole would lose the line numbers.
    with _opened(file, name) as stream:
        text = stream.read()
    wanted = "a list of objects (one object a line belongs in a .jsonl file)"
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip_blank(position: int) -> int:
        match = _BLANK.match(text, position)
        return match.end() if match else position

    def place(position: int) -> str:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return f"{name}:{line}"

    position = skip_blank(0)
    if position == len(text):
        return
    if text[position] != "[":
        raise _malformed(place(position), "the file does not begin with '['", wanted)
    position = skip_blank(position + 1)
    closed = text.startswith("]", position)
    while not closed:
        where = place(position)
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _malformed(f"{name}:{error.lineno}", error.msg, wanted) from error
        except (ValueError, RecursionError) as error:
            raise _malformed(where, str(error), wanted) from error
        yield where, record
        position = skip_blank(position)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise _malformed(place(position), "expecting ',' or ']'", wanted)
            position = skip_blank(position + 1)
    end = skip_blank(position + 1)
    if end != len(text):
        raise _malformed(place(end), "something follows the list", wanted)


def _malformed(where: str, reason: str, wanted: str) -> DataError:
    return DataError(f"{where}: malformed JSON: {reason}.", f"Mend the file: it holds {wanted}.")


def _documents(file: Traversable, name: str) -> Iterator[tuple[str, object]]:
    with _opened(file, name) as stream:
        for blank, lines in groupby(enumerate(stream, 1), key=lambda item: not item[1].strip()):
            if not blank:
                numbered = list(lines)
                text = "".join(line for _, line in numbered).rstrip("\n")
                yield f"{name}:{numbered[0][0]}", {"text": text}


def _hub(identifier: str, split: str, trust_remote_code: bool) -> Iterator[tuple[str, object]]:
    """Rows of a hub data set; whatever ``datasets`` raises becomes DataError."""
    try:
        import inspect

        from datasets import load_dataset

        options: dict[str, Any] = {}
        # Later versions refuse the very word, whatever its value.
        if trust_remote_code and "trust_remote_code" in inspect.signature(load_dataset).parameters:
            options["trust_remote_code"] = True
        for number, row in enumerate(load_dataset(identifier, split=split, **options), 1):
            yield f"{identifier} row {number}", row
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load the data set {identifier!r} (split {split!r}): {cause}",
            "Check its name, its split and the network, or download it and give a "
            ".jsonl, .json or .txt file.",
        ) from error


_READERS: dict[str, Callable[[Traversable, str], Iterator[tuple[str, object]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".txt": _documents,
}
_SOURCES_HELP = "A source is embedded:prompts, a .jsonl, .json or .txt file, or a hub data set id."
