"""A tiny model that routes by the token, by both attention kernels, and its oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from by_hand import MakeModel, MakeRouters
from token_oracle import Oracle, plain, routers_for
from transformers import LlamaForCausalLM

from mskip.compressor.sublayers import Granularity
from mskip.compressor.token_skipping import TokenSkip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["attention", "mlp", "block"])
def granularity(request: pytest.FixtureRequest) -> Granularity:
    value: Granularity = request.param
    return value


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: MakeModel) -> LlamaForCausalLM:
    """Eager in float32: transformers' eager attention gives NaN for float64 and left padding."""
    model = tiny_model(attn_implementation=request.param)
    model.generation_config.eos_token_id = None  # every generation runs to its full length
    return model.double() if request.param == "sdpa" else model


@pytest.fixture(scope="module")
def oracle(model: LlamaForCausalLM) -> Oracle:
    """`plain` on a copy of the model, in float64."""
    return functools.partial(plain, copy.deepcopy(model).double())


@pytest.fixture
def skip(
    model: LlamaForCausalLM, tiny_routers: MakeRouters, granularity: Granularity
) -> Iterator[TokenSkip]:
    with TokenSkip(model, routers_for(model, tiny_routers, granularity)) as attached:
        yield attached
