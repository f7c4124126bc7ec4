"""Compensation: fitted in closed form, trained with the routers, resumed; checkpointed layers."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mskip.compressor.baselines import forced_to, router_inputs, static_gates
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Sample
from mskip.compressor.evaluation import Reference
from mskip.compressor.fitting import Regression, fit_compensation, reduced_rank
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.recipe import RouterSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.starting import initialise
from mskip.compressor.sublayers import Granularity, Sublayers
from mskip.compressor.tuning import Interrupted, Tuned, tune

MakeSamples = Callable[..., list[Sample]]
LAYERS = [2, 3, 4]
RATE = 5e-3


# -- the closed form --------------------------------------------------------------------------


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Inputs of unequal variance, and a noisy affine map of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.linspace(0.1, 3, 12) + 1.0
    weight = torch.randn(12, 12, generator=generator)
    return x, x @ weight + 2.0 + 0.1 * torch.randn(400, 12, generator=generator)


def regression(x: Tensor, y: Tensor) -> Regression:
    sums = Regression(12, x.device)
    for start in range(0, len(x), 70):
        sums.add(x[start : start + 70], y[start : start + 70])
    return sums


def test_ridge_is_that_of_the_normal_equations(data: tuple[Tensor, Tensor]) -> None:
    x, y = (part.double() for part in data)
    weight, bias, _ = regression(*data).solve(0.5)
    centred, target = x - x.mean(0), y - y.mean(0)
    covariance = centred.T @ centred / len(x)
    penalty = 0.5 * covariance.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(covariance + penalty, centred.T @ target / len(x))
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_no_map_of_the_rank_is_better(data: tuple[Tensor, Tensor], rank: int) -> None:
    """In the metric of the inputs; nudging the factors any way makes it worse."""
    weight, _, covariance = regression(*data).solve(0.0)
    down, up = reduced_rank(weight, covariance, rank)
    assert (down.shape, up.shape) == ((12, rank), (rank, 12))

    def error(product: Tensor) -> float:
        difference = weight - product
        return float(torch.trace(difference.T @ covariance @ difference))

    least = error(down @ up)
    values = torch.linalg.eigvalsh(weight.T @ covariance @ weight)
    assert least == pytest.approx(float(values[: 12 - rank].sum()), rel=1e-6, abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        shift = [0.01 * torch.randn(part.shape, generator=generator) for part in (down, up)]
        assert error((down + shift[0]) @ (up + shift[1])) >= least - 1e-9


@pytest.mark.parametrize("granularity", ["attention", "mlp", "block"])
@pytest.mark.parametrize("rank", [4, 32])
def test_a_fit_takes_back_part_of_what_skipping_loses(
    base: BaseModel, make_samples: MakeSamples, granularity: Granularity, rank: int
) -> None:
    """Hidden 32 is full rank: one factor. All skipped, on the samples of the fit."""
    samples = make_samples(48, prompt=(8, 12), answer=(8, 12))
    none = static_gates([], len(LAYERS))
    bare = Sublayers(LAYERS, granularity)
    with patched(base.model, bare):
        lost = Reference(base, 2, samples).quality(forced_to(none)).kl
    compensation = Compensation(len(LAYERS), 32, rank).requires_grad_(False)
    sublayers = Sublayers(LAYERS, granularity, compensation)
    with patched(base.model, sublayers):
        reference = Reference(base, 2, samples)
        fit_compensation(reference, sublayers, none, 0.01)
        left = reference.quality(forced_to(none)).kl
    assert (compensation.up is None) == (rank == 32)
    assert 0 < left < 0.9 * lost


# -- refined by tuning ------------------------------------------------------------------------


def start(base: BaseModel, samples: list[Sample]) -> Routers:
    """Routers at zero logits, with a small random compensation."""
    compensation = Compensation(len(LAYERS), 32, 4).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for value in compensation.parameters():
        value.normal_(std=0.05, generator=generator)
    routers = Routers(Sublayers(LAYERS, "attention", compensation), 32)
    with patched(base.model, routers.sublayers):
        inputs = router_inputs(Reference(base, 2, samples[:8]))
    initialise(routers, RouterSpec(init="zeros"), inputs, {}, 0.5)
    return routers


def tuned(
    base: BaseModel, samples: list[Sample], folder: Path, *, rate: float | None = RATE, **more: Any
) -> Tuned:
    options = {key: more.pop(key) for key in ("resume", "progress") if key in more}
    settings = {"bf16": False, "max_steps": 8, "save_steps": 100, "noise_until": 0.0, **more}
    spec = TuningSpec(**settings)
    return tune(
        base, start(base, samples), samples, spec, 0.5, folder, refine_rate=rate, start_price=0.5,
        **options,
    )  # fmt: skip


def maps(outcome: Tuned) -> Compensation:
    compensation = outcome.routers.sublayers.compensation
    assert compensation is not None
    return compensation


def test_maps_stay_unless_refined(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(24)
    before = maps(Tuned(start(base, samples))).state_dict()
    outcome = tuned(base, samples, tmp_path, rate=None)
    for name, value in maps(outcome).state_dict().items():
        assert torch.equal(value, before[name])


def test_refining_lowers_the_loss_and_leaves_the_backbone(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(24)
    backbone = copy.deepcopy(base.model.state_dict())
    fixed = tuned(base, samples, tmp_path / "fixed", rate=None, max_steps=24)
    refined = tuned(base, samples, tmp_path / "refined", max_steps=24)
    last = [sum(step.loss for step in each.trace[-6:]) for each in (refined, fixed)]
    assert last[0] < last[1]
    assert all(not p.requires_grad for p in maps(refined).parameters())
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, backbone[name])


def test_both_rates_follow_the_course(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """The trace shows the routers' rate; a rate near zero leaves the maps alone."""
    samples = make_samples(24)
    before = maps(Tuned(start(base, samples))).down.clone()
    outcome = tuned(base, samples, tmp_path, rate=1e-12, learning_rate=0.2)
    assert max(step.learning_rate for step in outcome.trace) == pytest.approx(0.2)
    torch.testing.assert_close(maps(outcome).down, before, rtol=0, atol=1e-9)
    assert outcome.routers.weight.any()


def test_interrupted_and_resumed_is_uninterrupted(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(24)
    whole = tuned(base, samples, tmp_path / "whole")

    def press(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tuned(base, samples, tmp_path / "cut", progress=press)
    (folder,) = (tmp_path / "cut").iterdir()
    saved = load_file(folder / "trained.safetensors")
    assert {f"compensation.{name}" for name in ("down", "up", "bias")} < set(saved)
    resumed = tuned(base, samples, tmp_path / "cut", resume=True)
    for ours, theirs in ((maps(resumed), maps(whole)), (resumed.routers, whole.routers)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [None, RATE])
def test_checkpointing_layers_changes_nothing(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, rate: float | None
) -> None:
    samples = make_samples(24)
    plain = tuned(base, samples, tmp_path / "plain", rate=rate)
    again = tuned(base, samples, tmp_path / "again", rate=rate, gradient_checkpointing=True)
    for ours, theirs in ((maps(again), maps(plain)), (again.routers, plain.routers)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)


def test_fixed_routers_stay_and_the_maps_learn(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(24)
    routers = start(base, samples)
    with torch.no_grad():
        routers.bias.copy_(torch.tensor([0.5, -0.5, -0.5]))
    before = copy.deepcopy(routers.state_dict())
    maps_before = copy.deepcopy(maps(Tuned(routers)).state_dict())
    spec = TuningSpec(bf16=False, max_steps=8, noise_until=0.0)
    outcome = tune(base, routers, samples, spec, 0.5, tmp_path, refine_rate=RATE, fixed=True)
    for name, value in outcome.routers.state_dict().items():
        assert torch.equal(value, before[name])
    down = maps(outcome).down
    # What always executes has no use for its map; what is always skipped has.
    assert torch.equal(down[0], maps_before["down"][0])
    assert not torch.equal(down[1], maps_before["down"][1])
    assert [step.capacity for step in outcome.trace] == pytest.approx([1 / 3] * 8)
