"""What an engine has answered already, kept so that no question is put twice.

An evaluation asks tens of thousands of questions and may be interrupted at any of them.
Each answer is a line of JSON in a file that only grows; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

from mskip.compressor.errors import ArtifactError


class AnswerStore:
    """Answers by question.

    A question is looked up by the hash of what asks it, of whom, and the question itself, so
    answers of other routers, thresholds, engines or versions may lie in the same file and
    are not found. A last line that was cut off by an interruption is passed over.

    Args:
        path: the file, made at the first answer; None keeps the answers in memory.
        identity: all that decides what the engine answers, as JSON values.

    Raises:
        ArtifactError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._identity = dict(identity or {})
        self._file: BufferedWriter | None = None
        self._answers: dict[str, Any] = {} if path is None else _read(path)

    def __len__(self) -> int:
        """Answers at hand, of any identity."""
        return len(self._answers)

    def get(self, *question: Any) -> Any:
        """The answer to a question; None where there is none yet."""
        return self._answers.get(self._key(question))

    def put(self, answer: Any, *question: Any) -> None:
        """Remember an answer: a JSON value, not None."""
        key = self._key(question)
        self._answers[key] = answer
        if self.path is None:
            return
        line = json.dumps({"key": key, "answer": answer}, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = _opened(self.path)
            self._file.write(line.encode())
        except OSError as error:
            raise _unusable(self.path, error) from error

    def flush(self) -> None:
        """Hand what was put to the system; an interruption after this loses nothing of it."""
        if self._file is not None and self.path is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise _unusable(self.path, error) from error

    def close(self) -> None:
        """Flush and close the file; the store stays usable."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key(self, question: tuple[Any, ...]) -> str:
        asked = json.dumps([self._identity, *question], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(asked.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unusable(path, error) from error
    answers = {}
    for line in lines:
        try:
            entry = json.loads(line)
            answers[str(entry["key"])] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue  # Cut off; the question will be asked again.
    return answers


def _opened(path: Path) -> BufferedWriter:
    """The file to append to, at the beginning of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, 2)
            if written.read(1) != b"\n":
                file.write(b"\n")
    return file


def _unusable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"cannot keep answers in {path}: {error.strerror or error}.",
        "Free space or fix the permissions; the file may be deleted at the price of its answers.",
    )
