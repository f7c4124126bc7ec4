"""What tuning takes in memory, by arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mskip.compressor.memory import tuning_memory, weight_bytes
from mskip.compressor.recipe import Recipe

if TYPE_CHECKING:
    from mskip.compressor.encoding import Sample
    from mskip.compressor.models import BaseModel

LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def recipe(**tuning: Any) -> Recipe:
    value = {"name": "x", "model": {"name": "y", "dtype": "bfloat16"}, "tuning": tuning}
    return Recipe.model_validate(value)


def test_checkpointing_keeps_inputs_only() -> None:
    plain = tuning_memory(recipe(max_length=2048), LLAMA_3_8B, 16 << 30, 1000)
    kept = tuning_memory(
        recipe(max_length=2048, gradient_checkpointing=True), LLAMA_3_8B, 16 << 30, 1000
    )
    assert kept.activations < plain.activations / 8  # one layer of 17, and 17 inputs
    assert kept.weights == plain.weights == 16 << 30
    assert plain.total == plain.weights + plain.activations + plain.logits + plain.store


def test_the_store_is_bounded_by_budget_and_by_data() -> None:
    assert tuning_memory(recipe(cache_gib=2.0), LLAMA_3_8B, 0, 10**6).store == 2 << 30
    one = tuning_memory(recipe(cache_gib=2.0, max_length=16), LLAMA_3_8B, 0, 1).store
    assert one == 2 * 16 * 4096 * 2


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_as_they_are_loaded(dtype: str, size: int, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(tiny_folder, dtype) == count * size


def test_activations_are_what_autograd_keeps(
    make_base: Callable[..., BaseModel], make_samples: Callable[..., list[Sample]]
) -> None:
    """Within a fifth of the bytes that torch packs for the backward pass of one step."""
    import torch

    from mskip.compressor.loss import RelaxedPass
    from mskip.compressor.patching import patched
    from mskip.compressor.router import Routers
    from mskip.compressor.samples import batches_of
    from mskip.compressor.segments import SplitModel

    base = make_base(hidden_size=64, intermediate_size=192)
    wanted = Recipe.model_validate(
        {
            "name": "x",
            "model": {"name": "y"},
            "routing": {"layers": [2, 3, 4]},
            "tuning": {"max_length": 64, "batch_size": 4},
        }
    )
    samples = make_samples(4, prompt=(32, 32), answer=(32, 32))
    routers = Routers([2, 3, 4], 64)
    (batch,) = batches_of(samples, base, 4)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    with patched(base.model, routers.sublayers):
        split = SplitModel(base.model, 2)
        stem = split.stem(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            split.finish(stem, RelaxedPass(routers, batch["prompt_mask"], 1.0, None))
    kept = sum(size for pointer, size in seen.items() if pointer not in weights)
    estimated = tuning_memory(wanted, base.model.config.to_dict(), 0, 4).activations
    assert estimated == pytest.approx(kept, rel=0.2)
