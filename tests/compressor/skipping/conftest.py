"""An attached tiny model, by both attention kernels, and prompts that it routes in both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from by_hand import LAYERS, LENGTHS, MakeModel, MakeRouters, Prompts, mixed, prefill
from transformers import LlamaForCausalLM

from mskip.compressor.encoding import Batch
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: MakeModel) -> LlamaForCausalLM:
    model = tiny_model(attn_implementation=request.param)
    model.generation_config.eos_token_id = None  # every generation runs to its full length
    return model


@pytest.fixture(scope="module")
def routers(model: LlamaForCausalLM, tiny_routers: MakeRouters) -> Routers:
    return tiny_routers(model, LAYERS)


@pytest.fixture
def skip(model: LlamaForCausalLM, routers: Routers) -> Iterator[MindSkip]:
    with MindSkip(model, routers) as attached:
        yield attached


@pytest.fixture
def batch(skip: MindSkip, prompt_batch: Prompts) -> Batch:
    """Eight prompts of 1 to 9 tokens, padded left, whose decisions are mixed."""
    batch = prompt_batch(LENGTHS)
    assert mixed(prefill(skip, batch).decisions)
    return batch
