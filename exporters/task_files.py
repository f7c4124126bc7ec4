"""The paper's nine tasks: what each asks for, and its documents from JSONL files.

The definitions are data (``recipes/tasks``): shots, metric and the prompt form of
lm-evaluation-harness. The documents are not shipped: they come from the hub, or from a folder
with a ``<task>.jsonl`` each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mskip.compressor.errors import DataError

PAPER = (
    *("boolq", "rte", "openbookqa", "piqa", "mmlu", "winogrande", "gsm8k", "hellaswag"),
    "arc_challenge",
)
"""Tasks of the paper (arXiv 2410.13184); each is a file in ``recipes/tasks``."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Definition:
    """A task.

    Attributes:
        name: here and in the harness.
        shots: examples in the prompt.
        metric: the one that is reported.
        config: the harness's configuration for documents of a file.
        keys: of a document in a file, with what is in them: "text", "texts" or "index".
        filter: of the harness, whose outcome the metric judges.
        by: key that divides the documents into tasks of the harness with examples of their own.
    """

    name: str
    shots: int
    metric: str
    config: dict[str, Any]
    keys: dict[str, str]
    filter: str = "none"
    by: str | None = None


@cache
def definition(name: str) -> Definition:
    """The task ``name`` of `PAPER`."""
    text = (resources.files("mskip.recipes") / "tasks" / f"{name}.yaml").read_text("utf-8")
    return Definition(name=name, **yaml.safe_load(text))


def task_names(text: str) -> list[str]:
    """Names in ``text``: "paper" for all, or some with commas between; each once, in order.

    Raises:
        DataError: there is no such task, or none is named.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    chosen = list(dict.fromkeys(PAPER if names == ["paper"] else names))
    unknown = [name for name in chosen if name not in PAPER]
    if unknown or not chosen:
        raise DataError(
            f"no task '{', '.join(unknown) or text}'.",
            f"There are: paper (all of them), {', '.join(PAPER)}.",
        )
    return chosen


# -- documents --------------------------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_text, value)) and all(value)


def _index(value: Any) -> bool:
    return type(value) is int or (_text(value) and value.isdecimal())


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (_text, "a text"),
    "texts": (_texts, "a list of texts, none of them empty"),
    "index": (_index, "a whole number from 0"),
}


def read_rows(path: Path, task: Definition) -> list[Row]:
    """Documents of a JSONL file, with the keys that the task needs and no others.

    Raises:
        DataError: missing, empty, or a line that is no document of the task; names the line.
    """
    needs = f"A line of it is a JSON object with {_wanted(task)}."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"no {path}, which task {task.name} needs.", needs) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}.", needs) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_row(line, task))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}.", needs) from None
    if not rows:
        raise DataError(f"{path} holds no documents.", needs)
    return rows


def _wanted(task: Definition) -> str:
    return ", ".join(f"'{key}' ({_KINDS[kind][1]})" for key, kind in task.keys.items())


def _row(line: str, task: Definition) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    row: Row = {}
    for key, kind in task.keys.items():
        holds, words = _KINDS[kind]
        if key not in value:
            raise ValueError(f"it lacks the key '{key}'")
        if not holds(value[key]):
            raise ValueError(f"'{key}' is not {words}")
        row[key] = int(value[key]) if kind == "index" else value[key]
    _check_choices(row, task)
    return row


def _check_choices(row: Row, task: Definition) -> None:
    """The harness would score a label out of range as wrong, and say nothing."""
    choices = task.config.get("doc_to_choice")
    if choices is None:
        return
    count = len(row[choices]) if isinstance(choices, str) else len(choices)
    for key, kind in task.keys.items():
        if kind == "texts" and len(row[key]) != count:
            raise ValueError(f"'{key}' has {len(row[key])} texts, not {count}")
        if kind == "index" and not 0 <= row[key] < count:
            raise ValueError(f"'{key}' is {row[key]}: there are {count} choices")


# -- tasks of the harness ---------------------------------------------------------------------


def examples_apart(rows: list[Row], task: Definition, path: Path) -> tuple[list[Row], list[Row]]:
    """Documents to score and documents to take examples from, where no file is set apart.

    The last tenth of the file is held out, at least as many as the task has shots, so that
    no scored document is ever an example. A task without shots scores everything.

    Raises:
        DataError: no document would be left.
    """
    if task.shots == 0:
        return rows, []
    held_out = max(task.shots, len(rows) // 10)
    if held_out >= len(rows):
        raise DataError(
            f"{path} holds {len(rows)} documents; {task.shots} are examples in the prompt.",
            f"Give more than {task.shots}, or examples in {_fewshot(path).name} beside it.",
        )
    return rows[:-held_out], rows[-held_out:]


def task_files(name: str, folder: Path) -> list[Path]:
    """Files of ``folder`` that a task reads."""
    path = folder / f"{name}.jsonl"
    return [each for each in (path, _fewshot(path)) if each.exists()]


def _fewshot(path: Path) -> Path:
    return path.with_name(f"{path.stem}_fewshot.jsonl")


def configs(task: Definition, folder: Path) -> list[dict[str, Any]]:
    """Configurations of the harness, with the documents of ``folder`` in memory.

    Examples come from ``<task>_fewshot.jsonl`` where that exists, else see `examples_apart`.

    Raises:
        DataError: see `read_rows`; also too few examples.
    """
    path = folder / f"{task.name}.jsonl"
    rows, fewshot = read_rows(path, task), _fewshot(path)
    if task.by is None and not fewshot.exists():
        scored, examples = examples_apart(rows, task, path)
    else:
        scored, examples = rows, read_rows(fewshot, task) if task.shots else []
    if task.by is None:
        return [_config(task, task.name, scored, examples, fewshot)]
    parts: dict[str, list[Row]] = {}
    for row in scored:
        parts.setdefault(row[task.by], []).append(row)
    return [
        _config(
            task,
            f"{task.name}_{part}",
            parts[part],
            [row for row in examples if row[task.by] == part],
            fewshot,
        )
        for part in sorted(parts)
    ]


def _config(
    task: Definition, name: str, scored: list[Row], examples: list[Row], fewshot: Path
) -> dict[str, Any]:
    if len(examples) < task.shots:
        raise DataError(
            f"{fewshot} holds {len(examples)} documents for {name}; it takes {task.shots}.",
            f"A line of it is a JSON object with {_wanted(task)}.",
        )

    def documents(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        splits = {"test": scored, "examples": examples}
        return {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}

    return {
        **task.config,
        "task": name,
        "num_fewshot": task.shots,
        "custom_dataset": documents,
        "test_split": "test",
        **({"fewshot_split": "examples"} if examples else {}),
    }
