"""Quality against direct computations on the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mskip.compressor.baselines import static_gates
from mskip.compressor.encoding import Sample, collate
from mskip.compressor.evaluation import Reference, answer_targets
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.routing import ForcedPass, HardPass, fresh_decisions

LAYERS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[Sample]]) -> list[Sample]:
    return make_samples(11, answer=(1, 9))


def answer_logits(model: torch.nn.Module, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Logits that predict each answer token, one sample at a time, and the tokens."""
    rows, tokens = [], []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        rows.append(logits[sample.prompt_length - 1 : -1])
        tokens.append(ids[0, sample.prompt_length :])
    return torch.cat(rows), torch.cat(tokens)


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean KL(teacher || student), written out."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def test_dense_is_itself(base: BaseModel, samples: list[Sample]) -> None:
    """KL zero; perplexity from the logits of ordinary calls."""
    quality = Reference(base, 1, samples, batch_size=4).quality(lambda _: None)
    logits, tokens = answer_logits(base.model, samples)
    assert quality.kl == pytest.approx(0, abs=1e-7)
    assert quality.tokens == len(tokens) == sum(len(s.input_ids) - s.prompt_length for s in samples)
    assert quality.perplexity == pytest.approx(math.exp(F.cross_entropy(logits, tokens)), rel=1e-5)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], []])
def test_static_mask_is_a_model_without_these_attentions(
    base: BaseModel, samples: list[Sample], kept: list[int]
) -> None:
    pruned = copy.deepcopy(base.model)
    for index, layer in enumerate(LAYERS):
        if index not in kept:
            pruned.model.layers[layer].self_attn.o_proj.weight.zero_()
    dense, tokens = answer_logits(base.model, samples)
    ours, _ = answer_logits(pruned, samples)
    with patched(base.model, LAYERS):
        reference = Reference(base, 1, samples, batch_size=3)
        quality = reference.quality(lambda _: ForcedPass(static_gates(kept, 4)))
    expected = divergence(dense, ours)
    assert quality.kl == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(F.cross_entropy(ours, tokens)), rel=1e-4)
    assert (expected > 1e-3) == (len(kept) < 4)


def test_routed_by_each_prompt(
    base: BaseModel, samples: list[Sample], tiny_routers: Callable[..., object]
) -> None:
    """Hard passes: the pruned model of each sample's own decisions."""
    routers = tiny_routers(base.model, LAYERS)
    passes: list[HardPass] = []

    def route(batch: dict[str, Tensor]) -> HardPass:
        mask = batch["prompt_mask"]
        passes.append(
            HardPass(routers, torch.full((4,), 0.5), mask, *fresh_decisions(len(mask), 4))
        )
        return passes[-1]

    with patched(base.model, LAYERS):
        reference = Reference(base, 1, samples, batch_size=4)
        quality = reference.quality(route)
    dense, _ = answer_logits(base.model, samples)
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    decisions = torch.cat([each.decisions for each in passes])
    assert 0 < decisions.float().mean() < 1
    students = {}
    for sample, taken in zip(ordered, decisions, strict=True):
        pruned = copy.deepcopy(base.model)
        for layer, executes in zip(LAYERS, taken.tolist(), strict=True):
            if not executes:
                pruned.model.layers[layer].self_attn.o_proj.weight.zero_()
        students[id(sample)] = answer_logits(pruned, [sample])[0]
    student = torch.cat([students[id(sample)] for sample in samples])
    assert quality.kl == pytest.approx(divergence(dense, student), rel=1e-4)


def test_batches_change_nothing(base: BaseModel, samples: list[Sample]) -> None:
    """Tokens are averaged, not batches."""
    gates = static_gates([0, 2], 4)
    shown: list[tuple[int, int]] = []
    qualities = []
    with patched(base.model, LAYERS):
        for size in (1, 4, 32):
            reference = Reference(
                base,
                1,
                samples,
                size,
                lambda stage, done, total, note="": shown.append((done, total)),
            )
            qualities.append(reference.quality(lambda _: ForcedPass(gates)))
    for quality in qualities[1:]:
        assert quality.kl == pytest.approx(qualities[0].kl, rel=1e-5)
        assert quality.perplexity == pytest.approx(qualities[0].perplexity, rel=1e-5)
    assert shown[10:] == [(11, 11), (1, 3), (2, 3), (3, 3), (1, 1)]


def test_answer_targets_are_the_answers() -> None:
    batch = collate([Sample([5, 6, 7, 8], 2), Sample([9, 10, 11], 1)], 0)
    assert answer_targets(batch).tolist() == [7, 8, 10, 11]
