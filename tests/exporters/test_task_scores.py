"""The paper's tasks on tiny files: prompts, scores, which documents, and figures."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from task_documents import LONG, METRIC, SCORED, SHOTS, Document, made, read, write, write_tasks

from mskip.compressor.errors import DataError, MissingExtraError
from mskip.exporters.answers import AnswerStore
from mskip.exporters.runner import Floats, Ints, Runner, State
from mskip.exporters.task_files import PAPER, configs, definition
from mskip.exporters.task_scores import (
    against,
    average,
    check_tasks,
    mean_and_error,
    score_tasks,
)

if TYPE_CHECKING:
    from conftest import Exported
    from transformers import PreTrainedTokenizerBase


pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


class Contexts(Runner):
    """Another runner, with the contexts that it read."""

    def __init__(self, inner: Runner) -> None:
        self.inner, self.name, self.contract = inner, inner.name, inner.contract
        self.read: list[list[int]] = []

    def forward(self, *arguments: Any) -> State:
        """See `Runner.forward`."""
        return self.inner.forward(*arguments)

    def forward_last(self, input_ids: Ints, mask: Ints, *others: Any) -> State:
        """See `Runner.forward_last`."""
        self.read += [ids[real == 1].tolist() for ids, real in zip(input_ids, mask, strict=True)]
        return self.inner.forward_last(input_ids, mask, *others)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        return self.inner.select(state, rows)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        return self.inner.kv_bytes(state)


class Parrot(Runner):
    """An engine that says one thing whatever it is asked."""

    name = "parrot"

    def __init__(self, says: list[int], like: Runner) -> None:
        self.says, self.contract = says, like.contract

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`."""
        said = 0 if cache is None else cache + input_ids.shape[1]
        logits = np.zeros((*input_ids.shape, self.contract.vocabulary), dtype=np.float32)
        logits[:, :, self.says[said % len(self.says)]] = 1.0
        scores = np.zeros(routing.shape, dtype=np.float32)
        return State(logits, np.ones_like(routing), scores, mask, said)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        raise NotImplementedError

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        return 0


@pytest.fixture
def tokenizer(exported: Exported) -> PreTrainedTokenizerBase:
    return exported.base.tokenizer


def contexts_of(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, name: str, folder: Path, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    """Scores of one task, and the contexts that were read, as text."""
    watched = Contexts(runner)
    scores = score_tasks(
        watched, tokenizer, [name], task_dir=folder, max_length=LONG, **options
    )["tasks"][name]  # fmt: skip
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in watched.read]
    return scores, texts


# -- scores -----------------------------------------------------------------------------------


def log_likelihood(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[float, int]:
    """One sequence, the context prefilled and the continuation read; and what was executed."""
    prompt = tokenizer(context)["input_ids"]
    rest = tokenizer(context + continuation)["input_ids"][len(prompt) :]
    state = runner.prefill(np.array([prompt]))
    following = runner.extend(state, np.array([rest]))
    logits = np.concatenate([state.logits[0, -1:], following.logits[0, :-1]]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(logits[np.arange(len(rest)), rest].sum()), int(state.routing.sum())


def lettered(document: Document) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", document["choices"], strict=True)]
    return "\n".join([document["question"].strip(), *lines, "Answer:"])


def mmlu_prompt(document: Document, folder: Path) -> str:
    subject = document["subject"]
    shown = [each for each in read(folder / "mmlu_fewshot.jsonl") if each["subject"] == subject]
    head = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n"
    )
    examples = [f"{lettered(each)} {'ABCD'[each['gold']]}\n\n" for each in shown[:5]]
    return head + "".join(examples) + lettered(document)


Question = Callable[[Document, Path], tuple[str, list[str], int]]
QUESTIONS: dict[str, Question] = {
    "boolq": lambda d, _: (
        d["query"].replace("Passage: ", "") + "\nAnswer:",
        ["no", "yes"],
        d["gold"],
    ),
    "rte": lambda d, _: (
        f"{d['premise']}\nQuestion: {d['hypothesis']} True or False?\nAnswer:",
        ["True", "False"],
        int(d["label"]),
    ),
    "openbookqa": lambda d, _: (d["query"], d["choices"], d["gold"]),
    "piqa": lambda d, _: (f"Question: {d['query']}\nAnswer:", d["choices"], d["gold"]),
    "mmlu": lambda d, folder: (mmlu_prompt(d, folder), list("ABCD"), d["gold"]),
}


@pytest.mark.parametrize("engine", ["torch_runner", "ort_runner"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_scores_are_those_of_one_sequence_at_a_time(
    name: str, engine: str, folder: Path, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    runner: Runner = request.getfixturevalue(engine)
    documents = read(folder / f"{name}.jsonl")
    documents.sort(key=lambda each: each.get("subject", ""))
    right, executed = [], {}
    for document in documents:
        prompt, choices, gold = QUESTIONS[name](document, folder)
        found = [log_likelihood(runner, tokenizer, prompt, f" {choice}") for choice in choices]
        executed[prompt] = found[0][1]
        lengths = [len(choice) if METRIC[name] == "acc_norm" else 1 for choice in choices]
        values = [total / length for (total, _), length in zip(found, lengths, strict=True)]
        right.append(int(np.argmax(values) == gold))
    scores = score_tasks(
        runner, tokenizer, [name], task_dir=folder, max_length=LONG, max_tokens=900
    )
    task = scores["tasks"][name]
    assert task["right"] == "".join(map(str, right))
    assert task["metric"] == METRIC[name]
    assert task["value"] == pytest.approx(np.mean(right))
    assert task["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert task["documents"] == SCORED[name]
    expected = sum(executed.values()) / len(executed) / 3
    assert task["capacity"] == scores["capacity"] == pytest.approx(expected)
    assert scores["skip_rate"] == pytest.approx(1 - expected)
    assert 0 < expected < 1


def test_scores_of_all_nine(torch_runner: Runner, tokenizer: Any, folder: Path) -> None:
    scores = score_tasks(
        torch_runner, tokenizer, PAPER, task_dir=folder, limit=2, routing=[1, 0, 0]
    )
    assert list(scores["tasks"]) == list(PAPER) == list(SHOTS)
    for name, task in scores["tasks"].items():
        assert (task["shots"], task["metric"]) == (SHOTS[name], METRIC[name])
        assert task["documents"] == len(task["right"]) == 2
        assert task["capacity"] == pytest.approx(1 / 3)
    values = [task["value"] for task in scores["tasks"].values()]
    assert scores["average"]["value"] == pytest.approx(np.mean(values))
    assert scores["engine"] == "PyTorch"
    assert {"mskip", "torch", "transformers", "lm_eval"} <= scores["versions"].keys()
    json.dumps(scores, allow_nan=False)


# -- examples in the prompt -------------------------------------------------------------------


def question_and_answer(name: str, document: Document) -> tuple[str, str]:
    """A document as the prompt asks it, and its right answer."""
    if name == "winogrande":
        return document["context_options"][document["gold"]], document["continuation"]
    if name == "gsm8k":
        return f"Question: {document['question']}\nAnswer:", document["answer"]
    answer = document["choices"][document["gold"]]
    query = document["query"]
    return query if name == "hellaswag" else f"Question: {query}\nAnswer:", answer


@pytest.mark.parametrize("name", ["winogrande", "gsm8k", "hellaswag", "arc_challenge"])
def test_examples_are_documents_that_are_not_scored(
    name: str, torch_runner: Runner, tokenizer: Any, folder: Path
) -> None:
    documents = read(folder / f"{name}.jsonl")
    scored, held_out = documents[: SCORED[name]], documents[SCORED[name] :]
    task, contexts = contexts_of(torch_runner, tokenizer, name, folder, routing=[1, 1, 1])
    assert task["documents"] == len(scored)
    asked = {
        option if name == "winogrande" else question_and_answer(name, document)[0]
        for document in scored
        for option in document.get("context_options", [""])
    }
    assert len(contexts) == len(asked)
    shown = {" ".join(question_and_answer(name, document)) for document in held_out}
    for context in contexts:
        *examples, question = context.split("\n\n")
        assert question in asked
        assert len(examples) == SHOTS[name]
        assert set(examples) <= shown
        asked.remove(question)


def test_examples_from_a_file_of_their_own(
    torch_runner: Runner, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "winogrande.jsonl", tmp_path)
    rng = random.Random(1)
    examples = [made("winogrande", rng) for _ in range(5)]
    write(tmp_path / "winogrande_fewshot.jsonl", examples)
    task, contexts = contexts_of(torch_runner, tokenizer, "winogrande", tmp_path)
    assert task["documents"] == SCORED["winogrande"] + 5
    shown = {" ".join(question_and_answer("winogrande", each)) for each in examples}
    assert all(set(context.split("\n\n")[:-1]) == shown for context in contexts)


def test_a_tenth_is_held_out(tmp_path: Path) -> None:
    rng = random.Random(1)
    write(tmp_path / "gsm8k.jsonl", [made("gsm8k", rng) for _ in range(83)])
    (config,) = configs(definition("gsm8k"), tmp_path)
    splits = config["custom_dataset"]()
    assert {split: len(rows) for split, rows in splits.items()} == {"test": 75, "examples": 8}


def test_the_number_after_the_hashes_is_judged(
    torch_runner: Runner, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    documents = read(folder / "gsm8k.jsonl")
    answers = [f"it is\n#### {number}" for number in ("7", "1,700", "8", "$7")]
    scored = [{**each, "answer": answer} for each, answer in zip(documents, answers, strict=False)]
    write(tmp_path / "gsm8k.jsonl", [*scored, *documents[4:]])
    says = tokenizer(" one is 9\n#### 7\n\nQuestion: #### 8", add_special_tokens=False)["input_ids"]
    scores = score_tasks(
        Parrot(says, torch_runner), tokenizer, ["gsm8k"], task_dir=tmp_path, max_length=LONG
    )
    assert scores["tasks"]["gsm8k"]["right"] == "1001"
    assert scores["tasks"]["gsm8k"]["value"] == 0.5


# -- which documents --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openbookqa", "winogrande", "mmlu"])
def test_a_limit_draws_the_same_documents_with_the_same_examples(
    name: str, torch_runner: Runner, tokenizer: Any, folder: Path
) -> None:
    def read_with(limit: int | None) -> set[str]:
        task, contexts = contexts_of(torch_runner, tokenizer, name, folder, limit=limit)
        assert task["documents"] == (limit or SCORED[name])
        return set(contexts)

    some, more, again = read_with(2), read_with(4), read_with(2)
    assert some == again
    assert some < more
    questions = {context.rsplit("\n\n", 1)[-1] for context in more}
    assert questions < {context.rsplit("\n\n", 1)[-1] for context in read_with(None)}
    first = [json.dumps(each) for each in read(folder / f"{name}.jsonl")[:2]]
    assert not all(any(q.split("\n")[0] in line for line in first) for q in questions)


def test_nothing_is_asked_of_the_network_or_printed(
    torch_runner: Runner,
    tokenizer: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    seen: list[tuple[str, int, int]] = []
    score_tasks(
        torch_runner,
        tokenizer,
        ["boolq", "winogrande"],
        task_dir=folder,
        max_tokens=1,
        label="torch routed: ",
        progress=lambda stage, done, total, note="": seen.append((stage, done, total)),
    )
    assert [each for each in seen if each[0] == "torch routed: boolq"] == [
        ("torch routed: boolq", done, 12) for done in range(0, 13, 2)
    ]
    assert seen[-1] == ("torch routed: winogrande", 14, 14)
    assert capfd.readouterr() == ("", "")


def test_answers_are_kept(torch_runner: Runner, tokenizer: Any, folder: Path) -> None:
    store = AnswerStore()
    tasks = ["boolq", "gsm8k"]
    first = score_tasks(torch_runner, tokenizer, tasks, task_dir=folder, limit=2, store=store)
    watched = Contexts(torch_runner)
    second = score_tasks(watched, tokenizer, tasks, task_dir=folder, limit=2, store=store)
    assert watched.read == []
    assert second["tasks"] == first["tasks"]
    assert second["capacity"] == first["capacity"]


@pytest.fixture
def few_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own definitions of three tasks: it takes a while to read all of them."""
    import lm_eval.tasks

    original, tasks = lm_eval.tasks.TaskManager.__init__, Path(lm_eval.tasks.__file__).parent
    folders = [tasks / name for name in ("super_glue/boolq", "arc", "winogrande")]

    def some(self: Any, include_defaults: bool) -> None:
        original(self, include_path=folders if include_defaults else None, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "__init__", some)


def as_on_the_hub(name: str, document: Document) -> Document:
    """A document of a file in the form that the hub has."""
    if name == "boolq":
        passage, question = document["query"].removeprefix("Passage: ").split("\nQuestion: ")
        return {"passage": passage, "question": question.rstrip("?"), "label": document["gold"]}
    choices = {"text": document["choices"], "label": list("ABCD")}
    answer = "ABCD"[document["gold"]]
    return {"question": document["query"], "choices": choices, "answerKey": answer}


@pytest.mark.parametrize("name", ["boolq", "arc_challenge"])
def test_the_hub_and_a_folder_ask_the_same(
    name: str,
    torch_runner: Runner,
    tokenizer: Any,
    folder: Path,
    few_definitions: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness's own definitions, with the folder's documents in place of the network."""
    import datasets

    documents = [as_on_the_hub(name, each) for each in read(folder / f"{name}.jsonl")]
    scored = datasets.Dataset.from_list(documents[: SCORED[name]])
    examples = datasets.Dataset.from_list(documents[SCORED[name] :] or documents)
    splits = {"train": examples, "validation": scored, "test": scored}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    task, contexts = contexts_of(torch_runner, tokenizer, name, folder)
    watched = Contexts(torch_runner)
    found = score_tasks(watched, tokenizer, [name], max_length=LONG)["tasks"][name]
    assert found == task
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in watched.read] == contexts
    some = score_tasks(torch_runner, tokenizer, [name], limit=2, max_length=LONG)
    assert some["tasks"][name]["documents"] == 2


def test_the_hub_cannot_be_reached(
    torch_runner: Runner, tokenizer: Any, few_definitions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(**_: Any) -> Any:
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="boolq from the hub: Couldn't reach") as caught:
        score_tasks(torch_runner, tokenizer, ["boolq"])
    assert "--task-dir" in caught.value.remedy


def test_without_lm_eval(
    torch_runner: Runner, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: score_tasks(torch_runner, tokenizer, ["boolq"], task_dir=folder),
        lambda: check_tasks(["boolq"], folder),
    ):
        with pytest.raises(MissingExtraError, match=r"mskip\[eval\]"):
            call()


# -- figures ----------------------------------------------------------------------------------


def test_figures() -> None:
    found = mean_and_error([1.0, 0.0, 0.0, 1.0])
    assert found == {"value": 0.5, "stderr": pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)}
    assert mean_and_error([1.0]) == {"value": 1.0, "stderr": None}
    both = average([{"value": 0.2, "stderr": 0.03}, {"value": 0.6, "stderr": 0.04}])
    assert both == {"value": pytest.approx(0.4), "stderr": pytest.approx(0.025)}
    assert average([{"value": 0.2, "stderr": None}])["stderr"] is None
    one = {"tasks": {"a": {"right": "1100"}, "b": {"right": "01"}}}
    other = {"tasks": {"a": {"right": "1110"}, "b": {"right": "01"}}}
    error = np.std([0, 0, -1, 0], ddof=1) / 2 / 2
    assert against(one, other) == {"value": -0.125, "stderr": pytest.approx(error)}
