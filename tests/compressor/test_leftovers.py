"""A call that has ended keeps nothing: neither its cache nor its graph waits for the collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from by_hand import MakeModel, MakeRouters, Prompts, inputs
from random_routers import routers_of
from router_tuning import LAYERS, spec, start
from token_oracle import routers_for

from mskip.compressor.encoding import Sample
from mskip.compressor.models import BaseModel
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_skipping import TokenSkip
from mskip.compressor.tuning import tune


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("granularity", ["attention", "mlp", "block"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
@torch.no_grad()
def test_a_cache_goes_with_its_last_holder(
    tiny_model: MakeModel,
    tiny_routers: MakeRouters,
    prompt_batch: Prompts,
    unit: str,
    granularity: Granularity,
    rank: int,
) -> None:
    model, batch = tiny_model(), prompt_batch([5, 3, 4, 6])
    attached = (
        TokenSkip(model, routers_for(model, tiny_routers, granularity, rank, [1, 2]))
        if unit == "token"
        else MindSkip(model, routers_of([1, 2], granularity, compensated=rank > 0))
    )
    with attached:
        prompt = model(**inputs(batch), use_cache=True)
        after = model(torch.ones(4, 1, dtype=torch.int64), past_key_values=prompt.past_key_values)
        held = weakref.ref(after.past_key_values)
        del prompt, after
        assert held() is None


def live_tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_steps_of_tuning_leave_nothing(
    base: BaseModel, make_samples: Callable[..., list[Sample]], tmp_path: Path
) -> None:
    samples = make_samples(16)
    routers, price = start(base, LAYERS, samples, 0.5)
    counts: list[int] = []

    def note(*_: object) -> None:
        counts.append(live_tensors())

    tune(base, routers, samples, spec(), 0.5, tmp_path, start_price=price, progress=note)
    # In the first epoch what the dense model gave is kept, and with the first step the optimiser's.
    assert len(counts) == 8
    assert counts[-1] == counts[-3]
