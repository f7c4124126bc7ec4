"""Contexts to calibrate on: those of documents that are not scored, and nothing of the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import task_contexts

pytest.importorskip("lm_eval")


def test_contexts_are_of_other_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "query": f"Passage: Of numbers.\nQuestion: is {n} even?\nAnswer:",
            "choices": ["no", "yes"],
            "gold": 1 - n % 2,
        }
        for n in range(12)
    ]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = task_contexts.contexts_of("boolq", tmp_path, 0, 5)
    others = task_contexts.contexts_of("boolq", tmp_path, 5, 100)
    assert (len(scored), len(others)) == (5, 7)
    assert not set(scored) & set(others)
    assert all(text.endswith("Answer:") for text in others)
    assert task_contexts.contexts_of("boolq", tmp_path, 12, 5) == []

    output = tmp_path / "contexts.jsonl"
    arguments = ["--task-dir", str(tmp_path), "--tasks", "boolq", "--skip", "5"]
    monkeypatch.setattr("sys.argv", ["task_contexts.py", *arguments, "--output", str(output)])
    task_contexts.main()
    prompts = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert prompts == others
