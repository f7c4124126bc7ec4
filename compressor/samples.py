"""The samples of a run: read, encoded, answered by the dense model, divided, kept.

The answers cost a minute on two cores, so they are kept in the run; they are
made again when the data, the tokenisation or the base model changes. A run that was
calibrated on other prompts than it was tuned on has those beside its own.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import mskip
from mskip.compressor.artifact import Run
from mskip.compressor.data import read_conversations, split_samples
from mskip.compressor.distillation import answer_prompts
from mskip.compressor.encoding import Batch, Sample, collate, encode
from mskip.compressor.errors import DataError
from mskip.compressor.files import sha256, write_text
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import Recipe

OTHER_SAMPLES = "calibration_samples.jsonl"
"""Other prompts that a run was calibrated on; a file of the run."""


@dataclass(frozen=True)
class Samples:
    """Disjoint samples, each with an answer.

    Attributes:
        tune: to tune on.
        calibration: to find tau on.
        held_out: to report on.
    """

    tune: list[Sample]
    calibration: list[Sample]
    held_out: list[Sample]


def read_samples(
    source: str, recipe: Recipe, base: BaseModel, limit: int | None, progress: Progress = silent
) -> list[Sample]:
    """Read and encode ``source``; prompts without an answer get the dense model's.

    Args:
        source: see `read_conversations`.
        recipe: its data and tuning sections.
        base: the dense model.
        limit: most conversations to read; None reads all.
        progress: shows the answers being written, and how many conversations are left out.

    Raises:
        DataError: unreadable, or nothing usable left.
    """
    conversations = read_conversations(
        source,
        split=recipe.data.split,
        max_samples=limit,
        trust_remote_code=recipe.model.trust_remote_code,
        shuffle_buffer=recipe.data.shuffle_buffer,
        seed=recipe.data.seed,
    )
    encoded = [encode(each, base.tokenizer, recipe.tuning.max_length) for each in conversations]
    samples = [sample for sample in encoded if sample is not None]
    answered = answer_prompts(
        base,
        samples,
        recipe.data.answer_tokens,
        progress=lambda done, total: progress("answer prompts", done, total),
    )
    usable = [sample for sample in answered if len(sample.input_ids) > sample.prompt_length]
    if not usable:
        raise DataError(
            f"{source}: none of {len(conversations)} conversations is usable: every prompt is "
            f"longer than {recipe.tuning.max_length} tokens or has no answer.",
            "Give shorter prompts, or raise tuning.max_length (in mskip calibrate --max-length).",
        )
    if left_out := len(conversations) - len(usable):
        note = f"{left_out} left out: longer than {recipe.tuning.max_length} tokens, or no answer"
        progress("read prompts", len(conversations), len(conversations), note)
    return usable


def run_samples(run: Run, recipe: Recipe, base: BaseModel, progress: Progress = silent) -> Samples:
    """The samples of a run, from its cache where that is still right.

    Raises:
        DataError: see `read_samples` and `split_samples`.
    """
    data = recipe.data
    extra = data.calibration + data.held_out
    limit = None if data.max_samples is None else data.max_samples + extra
    samples = _kept_samples(run.path / "samples.jsonl", recipe, base, limit, progress)
    return Samples(*split_samples(samples, data.calibration, data.held_out, data.seed))


def other_prompts(
    run: Run,
    recipe: Recipe,
    base: BaseModel,
    source: str,
    max_length: int,
    progress: Progress = silent,
) -> Samples:
    """Samples of other prompts than the recipe's: none to tune on, the others halved at most.

    Args:
        run: keeps them in ``calibration_samples.jsonl``.
        recipe: says how many are wanted.
        base: the dense model.
        source: see `read_conversations`.
        max_length: in tokens, prompt and answer together; longer prompts are left out.
        progress: shows the answers being written.

    Raises:
        DataError: see `read_samples`; or there is one only.
    """
    data = recipe.data
    other = recipe.model_copy(
        update={
            "data": data.model_copy(update={"source": source, "max_samples": None}),
            "tuning": recipe.tuning.model_copy(update={"max_length": max_length}),
        }
    )
    kept = run.path / OTHER_SAMPLES
    samples = _kept_samples(kept, other, base, data.calibration + data.held_out, progress)
    if len(samples) < 2:
        raise DataError(f"{source}: one usable prompt is too few.", "Give 2 or more.")
    random.Random(data.seed).shuffle(samples)
    held_out = min(data.held_out, len(samples) // 2)
    return Samples([], samples[held_out:][: data.calibration], samples[:held_out])


def calibrated_samples(
    run: Run, recipe: Recipe, base: BaseModel, progress: Progress = silent
) -> Samples:
    """The samples that a run was calibrated on: its own, or others that it was given.

    A run that is not calibrated has its own.

    Raises:
        ArtifactError: the calibration is damaged.
        DataError: see `run_samples` and `other_prompts`.
    """
    calibrated = (run.path / "calibration.json").is_file()
    other = run.calibration().get("data") if calibrated else None
    if other is None:
        return run_samples(run, recipe, base, progress)
    return other_prompts(run, recipe, base, other["source"], other["max_length"], progress)


def _kept_samples(
    kept: Path, recipe: Recipe, base: BaseModel, limit: int | None, progress: Progress
) -> list[Sample]:
    """`read_samples` of the recipe, from a file where that is still right."""
    data = recipe.data
    key = hashlib.sha256(
        json.dumps(
            [
                data.model_dump(),
                recipe.tuning.max_length,
                base.sha256,
                _tokenizer_key(base),
                _content_key(data.source),
            ]
        ).encode()
    ).hexdigest()
    samples = _read_cache(kept.read_bytes(), key) if kept.is_file() else None
    if samples is None:
        samples = read_samples(data.source, recipe, base, limit, progress)
        lines = [json.dumps({"key": key}), *(json.dumps(asdict(sample)) for sample in samples)]
        write_text(kept, "\n".join(lines) + "\n")
    return samples


def batches_of(samples: list[Sample], base: BaseModel, size: int) -> list[Batch]:
    """Batches of samples of like length, padded on the right, on the model's device."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    pad_id = int(base.tokenizer.pad_token_id)
    return [
        {
            name: value.to(base.model.device)
            for name, value in collate(ordered[start : start + size], pad_id).items()
        }
        for start in range(0, len(ordered), size)
    ]


def _content_key(source: str) -> str:
    path = Path(source)
    return sha256(path) if path.is_file() else mskip.__version__


def _tokenizer_key(base: BaseModel) -> list[str]:
    files = sorted(base.folder.glob("tokenizer*"))
    return [str(base.tokenizer.chat_template), *(sha256(path) for path in files)]


def _read_cache(text: bytes, key: str) -> list[Sample] | None:
    try:
        head, *rows = [json.loads(line) for line in text.splitlines()]
        if head["key"] != key:
            return None
        return [Sample(row["input_ids"], row["prompt_length"]) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None  # Written by another version, or damaged: made again.
