"""Answers by the dense model, and the samples that a run keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mskip.compressor.artifact import Run
from mskip.compressor.distillation import answer_prompts
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import DataError
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.recipe import DataSpec, ModelSpec, Recipe, RoutingSpec, TuningSpec
from mskip.compressor.samples import (
    batches_of,
    calibrated_samples,
    other_prompts,
    read_samples,
    run_samples,
)

MakeSamples = Callable[..., list[Sample]]


@pytest.fixture
def prompts(make_samples: MakeSamples) -> list[Sample]:
    """Prompts of many lengths without an answer, and two with one."""
    bare = [
        Sample(sample.input_ids[: sample.prompt_length], sample.prompt_length)
        for sample in make_samples(9, prompt=(2, 14))
    ]
    answered = make_samples(2, seed=1)
    return [*bare[:4], answered[0], *bare[4:], answered[1]]


def greedy(base: BaseModel, prompt: list[int], tokens: int) -> list[int]:
    output = base.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return list(output[0].tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_are_the_greedy_ones(
    base: BaseModel, prompts: list[Sample], batch_size: int
) -> None:
    """What generate gives for each prompt alone; answered ones stay as they are."""
    shown: list[tuple[int, int]] = []
    answered = answer_prompts(
        base,
        prompts,
        6,
        batch_size=batch_size,
        progress=lambda done, total: shown.append((done, total)),
    )
    assert len(answered) == len(prompts)
    for before, after in zip(prompts, answered, strict=True):
        if len(before.input_ids) > before.prompt_length:
            assert after == before
        else:
            assert after.prompt_length == len(before.input_ids)
            assert after.input_ids == greedy(base, before.input_ids, 6)
    assert shown[-1] == (9, 9)


def test_answers_end_at_the_end(make_base: Callable[..., BaseModel], prompts: list[Sample]) -> None:
    """With the token that ends them, and nothing of what fills the batch after it."""
    base = make_base()
    bare = [sample for sample in prompts if len(sample.input_ids) == sample.prompt_length]
    free = [sample.input_ids[sample.prompt_length :] for sample in answer_prompts(base, bare, 8)]
    end = free[0][2]
    base.model.generation_config.eos_token_id = [end, 3]
    ended = [sample.input_ids[sample.prompt_length :] for sample in answer_prompts(base, bare, 8)]
    assert ended == [
        answer[: answer.index(end) + 1] if end in answer else answer for answer in free
    ]
    assert min(map(len, ended)) < max(map(len, ended)) == 8
    base.model.generation_config.eos_token_id = end
    assert [s.input_ids[s.prompt_length :] for s in answer_prompts(base, bare, 8)] == ended


def test_nothing_to_answer(
    base: BaseModel, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(3)
    monkeypatch.setattr(base.model, "generate", None)
    assert answer_prompts(base, samples, 4) == samples
    assert answer_prompts(base, [], 4) == []


def test_batches_are_sorted_and_padded_on_the_right(
    base: BaseModel, make_samples: MakeSamples
) -> None:
    samples = make_samples(7)
    batches = batches_of(samples, base, 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert lengths == sorted(len(sample.input_ids) for sample in samples)
    pad = base.tokenizer.pad_token_id
    for batch in batches:
        assert bool(batch["attention_mask"][:, 0].all())
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == pad).all())


# -- the cache of a run -----------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_folder: Path) -> BaseModel:
    return load_base(ModelSpec(name=str(tiny_folder)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    write_prompts(path, 20)
    return path


def write_prompts(path: Path, count: int) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"what is {number} and {number * 7 % 13}?"}]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_recipe(folder: Path, source: Path, **data: Any) -> Recipe:
    return Recipe(
        name="tiny",
        model=ModelSpec(name=str(folder)),
        routing=RoutingSpec(last=2),
        data=DataSpec(
            **{
                "source": str(source),
                "calibration": 5,
                "held_out": 6,
                "answer_tokens": 5,
                **data,
            }
        ),
    )


@pytest.fixture
def generations(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the dense model was asked to answer."""
    calls: list[int] = []
    generate = tiny.model.generate

    def count(**options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        return generate(**options)

    monkeypatch.setattr(tiny.model, "generate", count)
    return calls


def test_samples_are_kept(
    tiny: BaseModel, tiny_folder: Path, source: Path, tmp_path: Path, generations: list[int]
) -> None:
    run, recipe = Run(tmp_path / "run"), make_recipe(tiny_folder, source)
    first = run_samples(run, recipe, tiny)
    assert sum(generations) == 20
    assert run_samples(run, recipe, tiny) == first
    assert sum(generations) == 20
    parts = [first.tune, first.calibration, first.held_out]
    assert [len(part) for part in parts] == [9, 5, 6]
    everything = [tuple(sample.input_ids) for part in parts for sample in part]
    assert len(set(everything)) == 20
    assert all(
        0 < len(sample.input_ids) - sample.prompt_length <= 5 for part in parts for sample in part
    )


@pytest.mark.parametrize("change", ["data", "model", "length", "answer", "count", "tokenizer"])
def test_samples_are_made_again(
    tiny: BaseModel,
    tiny_folder: Path,
    source: Path,
    tmp_path: Path,
    generations: list[int],
    change: str,
) -> None:
    """When the data, the base model, the lengths or the tokenisation change."""
    from dataclasses import replace

    run, recipe = Run(tmp_path / "run"), make_recipe(tiny_folder, source)
    before = run_samples(run, recipe, tiny)
    generations.clear()
    base = tiny
    if change == "data":
        write_prompts(source, 19)
    elif change == "model":
        base = replace(tiny, sha256="1" * 64)
    elif change == "length":
        recipe = recipe.model_copy(update={"tuning": TuningSpec(max_length=40)})
    elif change == "answer":
        recipe = make_recipe(tiny_folder, source, answer_tokens=3)
    elif change == "count":
        recipe = make_recipe(tiny_folder, source, max_samples=4)
    else:
        tiny.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}: {% endfor %}"
    after = run_samples(run, recipe, base)
    assert sum(generations) == {"data": 19, "count": 4 + 11}.get(change, 20)
    assert (after == before) == (change in ("model", "length"))
    generations.clear()
    assert run_samples(run, recipe, base) == after
    assert not generations


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe\x00 no text", b"[1]\n", b"{}\n", None], ids=repr
)
def test_a_damaged_cache_is_made_again(
    tiny: BaseModel,
    tiny_folder: Path,
    source: Path,
    tmp_path: Path,
    generations: list[int],
    damage: bytes | None,
) -> None:
    run, recipe = Run(tmp_path / "run"), make_recipe(tiny_folder, source)
    first = run_samples(run, recipe, tiny)
    cache = run.path / "samples.jsonl"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-30] if damage is None else damage)
    assert run_samples(run, recipe, tiny) == first
    assert sum(generations) == 40
    assert cache.read_bytes() == whole


def test_nothing_usable(tiny: BaseModel, tiny_folder: Path, source: Path) -> None:
    recipe = make_recipe(tiny_folder, source).model_copy(
        update={"tuning": TuningSpec(max_length=8)}
    )
    with pytest.raises(DataError, match=r"none of 20 .* 8 tokens"):
        read_samples(str(source), recipe, tiny, None)


def test_what_is_left_out_is_said(tiny: BaseModel, tiny_folder: Path, source: Path) -> None:
    recipe = make_recipe(tiny_folder, source)
    told: list[tuple[str, str]] = []

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        told.append((stage, note))

    whole = read_samples(str(source), recipe, tiny, None, progress)
    assert not [stage for stage, _ in told if stage == "read prompts"]
    with source.open("a") as file:
        file.write(json.dumps({"prompt": "one " * 2000}) + "\n")
    assert read_samples(str(source), recipe, tiny, None, progress) == whole
    (note,) = [note for stage, note in told if stage == "read prompts"]
    assert note == "1 left out: longer than 512 tokens, or no answer"


def test_other_prompts_are_halved_at_most(
    tiny: BaseModel, tiny_folder: Path, source: Path, tmp_path: Path, generations: list[int]
) -> None:
    """They come from the other file, as long as is asked, are kept, and end with calibration."""
    run, recipe = Run(tmp_path / "run"), make_recipe(tiny_folder, source)
    run_samples(run, recipe, tiny)
    generations.clear()
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"the question {number} is " + "one " * 600} for number in range(8)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))

    samples = other_prompts(run, recipe, tiny, str(other), 1000)
    assert samples.tune == []
    assert (len(samples.calibration), len(samples.held_out)) == (4, 4)
    everything = [*samples.calibration, *samples.held_out]
    assert len({tuple(sample.input_ids) for sample in everything}) == 8
    assert min(sample.prompt_length for sample in everything) > recipe.tuning.max_length
    assert sum(generations) == 8
    assert other_prompts(run, recipe, tiny, str(other), 1000) == samples
    assert sum(generations) == 8

    run.write_calibration({"tau": [0.5, 0.5], "data": None})
    own = calibrated_samples(run, recipe, tiny)
    assert own == run_samples(run, recipe, tiny)
    run.write_calibration({"tau": [0.5], "data": {"source": str(other), "max_length": 1000}})
    assert calibrated_samples(run, recipe, tiny) == samples

    with pytest.raises(DataError, match=r"none of 8 .* 600 tokens"):
        other_prompts(run, recipe, tiny, str(other), 600)
    other.write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="too few"):
        other_prompts(run, recipe, tiny, str(other), 1000)
