"""Random documents of the nine tasks, in the words of the tiny tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]
# Ten words are 60 tokens of the tiny tokenizer, and 25 examples 4,000: positions are rotary.
LONG = 8192
SHOTS = {
    "boolq": 0, "rte": 0, "openbookqa": 0, "piqa": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5,
    "hellaswag": 10, "arc_challenge": 25,
}  # fmt: skip
METRIC = {
    "boolq": "acc", "rte": "acc", "openbookqa": "acc_norm", "piqa": "acc_norm", "mmlu": "acc",
    "winogrande": "acc", "gsm8k": "exact_match", "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
}  # fmt: skip
SCORED = {
    "boolq": 6, "rte": 6, "openbookqa": 6, "piqa": 6, "mmlu": 8, "winogrande": 7, "gsm8k": 4,
    "hellaswag": 4, "arc_challenge": 3,
}  # fmt: skip
SUBJECTS = ["abstract_algebra", "anatomy"]
WORDS = ["user", "assistant", "system", "the", "answer", "is", "question", "one", "two", "Response"]


def made(name: str, rng: random.Random) -> Document:
    """A random document of a task."""

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    choices = [words(1, 6) for _ in range(4)]
    if name == "boolq":
        query = f"Passage: {words(5, 9)}\nQuestion: {words(2, 4)}?"
        return {"query": query, "choices": ["no", "yes"], "gold": rng.randrange(2)}
    if name == "rte":
        label = str(rng.randrange(2))
        return {"premise": words(4, 9), "hypothesis": words(2, 4), "label": label}
    if name == "gsm8k":
        return {"question": words(3, 6), "answer": f"{words(2, 3)}\n#### {rng.randrange(2)},700"}
    if name == "winogrande":
        options = [words(3, 5) for _ in range(2)]
        gold = rng.randrange(2)
        return {"context_options": options, "continuation": words(2, 4), "gold": gold}
    if name == "mmlu":
        subject, gold = rng.choice(SUBJECTS), rng.randrange(4)
        return {"subject": subject, "question": f" {words(3, 6)}", "choices": choices, "gold": gold}
    choices = choices[: 2 if name == "piqa" else 4]
    return {"query": words(3, 6), "choices": choices, "gold": rng.randrange(len(choices))}


def write(path: Path, documents: Sequence[Document]) -> None:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in documents), encoding="utf-8")


def read(path: Path) -> list[Document]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_tasks(path: Path) -> Path:
    """A file a task, and examples for MMLU, in the folder ``path``."""
    rng = random.Random(0)
    for name, count in SCORED.items():
        held_out = SHOTS[name] if name != "mmlu" else 0
        write(path / f"{name}.jsonl", [made(name, rng) for _ in range(count + held_out)])
    examples = [{**made("mmlu", rng), "subject": each} for each in SUBJECTS for _ in range(6)]
    write(path / "mmlu_fewshot.jsonl", examples)
    return path
