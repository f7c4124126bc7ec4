"""A base model and samples for the tests of tuning, calibration and evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from mskip.compressor.encoding import Sample
    from mskip.compressor.models import BaseModel


@pytest.fixture(scope="session")
def make_base(
    tiny_model: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Callable[..., BaseModel]:
    """Factory of base models in memory: ``make_base(seed=0, **config)``, six layers."""
    from mskip.compressor.models import BaseModel

    tokenizer = make_tokenizer()
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }

    def make(seed: int = 0, **overrides: Any) -> BaseModel:
        settings = {"num_hidden_layers": 6, "vocab_size": len(tokenizer), **ids, **overrides}
        model = tiny_model(seed, **settings)
        return BaseModel(model, tokenizer, Path("/nowhere"), "0" * 64)

    return make


@pytest.fixture(scope="session")
def base(make_base: Callable[..., BaseModel]) -> BaseModel:
    """One base model for all tests: six layers; every test leaves it as it was."""
    return make_base()


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[Sample]]:
    """Factory of random samples.

    ``make_samples(count, seed=0, prompt=(3, 9), answer=(2, 6))``; lengths are drawn from the
    ranges, both ends included.
    """
    from mskip.compressor.encoding import Sample

    def make(
        count: int,
        seed: int = 0,
        prompt: tuple[int, int] = (3, 9),
        answer: tuple[int, int] = (2, 6),
    ) -> list[Sample]:
        rng = random.Random(seed)
        samples = []
        for _ in range(count):
            first, rest = rng.randint(*prompt), rng.randint(*answer)
            samples.append(Sample([rng.randrange(4, 90) for _ in range(first + rest)], first))
        return samples

    return make
