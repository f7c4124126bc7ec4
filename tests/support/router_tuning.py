"""Short runs of router tuning on the tiny model, and what makes two of them the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mskip.compressor.baselines import measure_sensitivity, router_inputs
from mskip.compressor.encoding import Sample
from mskip.compressor.evaluation import Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import Step
from mskip.compressor.patching import patched
from mskip.compressor.recipe import RouterSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.starting import first_price, initialise
from mskip.compressor.tuning import Tuned

LAYERS = [2, 3, 4]


def spec(**changes: Any) -> TuningSpec:
    """Eight steps of eight samples in float32, unless changed."""
    return TuningSpec(**{"bf16": False, "max_steps": 8, "save_steps": 100, **changes})


def start(
    base: BaseModel, layers: list[int], samples: list[Sample], target: float, scale: float = 0.2
) -> tuple[Routers, float]:
    """Routers started by sensitivity, and the first price; a small scale lets gates flip soon."""
    with patched(base.model, layers):
        reference = Reference(base, layers[0], samples[:16])
        sensitivity = measure_sensitivity(reference, layers)
        inputs = router_inputs(reference)
    routers = Routers(layers, base.model.config.hidden_size)
    router = RouterSpec(init_scale=scale, init="sensitivity")
    initialise(routers, router, inputs, {"sensitivity": sensitivity.kl}, target)
    # Several skips cost more than the sum of each alone.
    return routers, 2 * first_price(sensitivity.kl, target)


def assert_same_outcome(ours: Tuned, theirs: Tuned, atol: float) -> None:
    """The same routers and the same trace."""
    for name, value in theirs.routers.state_dict().items():
        torch.testing.assert_close(ours.routers.state_dict()[name], value, rtol=0, atol=atol)
    assert_same_trace(ours.trace, theirs.trace, atol)


def assert_same_trace(ours: list[Step], theirs: list[Step], atol: float) -> None:
    """The same figures in every step."""
    assert [step.step for step in ours] == [step.step for step in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert vars(mine) == pytest.approx(vars(other), rel=1e-5, abs=atol)
