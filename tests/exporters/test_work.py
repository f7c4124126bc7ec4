"""Operations and bytes counted from a graph, against PyTorch's own counter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from architectures import HIDDEN, make
from random_routers import routers_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mskip.compressor.models import BaseModel

ROUTED = [1, 2]


@pytest.fixture(scope="module")
def exported(
    make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseModel, Path]:
    from mskip.compressor.models import BaseModel
    from mskip.exporters.onnx_export import contract_of, export_onnx
    from mskip.exporters.targets import Form

    base = BaseModel(make("llama"), make_tokenizer(), None, "")  # type: ignore[arg-type]
    routers = routers_of(ROUTED, "attention", compensated=False)
    folder = tmp_path_factory.mktemp("work")
    contract = contract_of(base, routers, [0.5, 0.5], 20, Form("ort"))
    export_onnx(base, routers, contract, folder, [])
    return base, folder


@pytest.mark.parametrize(("batch", "past"), [(1, 5), (3, 12)])
def test_step_counts_what_pytorch_counts(
    exported: tuple[BaseModel, Path], batch: int, past: int
) -> None:
    """One new position sees all others, as in PyTorch's product of scores, which has no mask."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.cache_utils import DynamicCache

    from mskip.exporters.work import Call, work_of

    base, folder = exported
    model = base.model
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, past, dtype=torch.long), past_key_values=cache)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    # PyTorch's counter takes the rotary table's outer product for one, too.
    config = model.config
    rotary = 2 * config.hidden_size // config.num_attention_heads // 2
    counted = counter.get_total_flops()
    found = work_of(folder, "dense.onnx", Call(batch, 1, past)).flops
    assert counted - batch * rotary <= found <= counted


def test_prefill_counts_visible_positions_and_one_head(
    exported: tuple[BaseModel, Path],
) -> None:
    from mskip.exporters.work import Call, work_of

    base, folder = exported
    config = base.model.config
    batch, new = 2, 6
    matrices = {name: value for name, value in base.model.named_parameters() if value.dim() == 2}
    layers = [value.numel() for name, value in matrices.items() if ".layers." in name]
    head = config.vocab_size * HIDDEN
    wide = config.hidden_size  # all heads together
    attention = 4 * wide * (1 + 2 + 3 + 4 + 5 + 6) * config.num_hidden_layers
    work = work_of(folder, "dense.onnx", Call(batch, new))
    assert work.flops == 2 * batch * (new * sum(layers) + head) + batch * attention
    assert work.weight_bytes == 4 * (sum(layers) + head + batch * new * HIDDEN)
    key_width = wide // config.num_attention_heads * config.num_key_value_heads
    each = 2 * 4 * key_width * config.num_hidden_layers
    assert work.cache_bytes == batch * each * (new + new)  # written and read
    assert work.bytes == work.weight_bytes + work.cache_bytes
    # The whole prompt's logits are the head for each position.
    whole = work_of(folder, "dense.onnx", Call(batch, new, kept=new))
    assert whole.flops - work.flops == 2 * batch * (new - 1) * head


def test_removed_layers_have_no_work(exported: tuple[BaseModel, Path]) -> None:
    from mskip.exporters.work import Call, work_of

    base, folder = exported
    call = Call(2, 6)
    dense, less = (work_of(folder, file, call) for file in ("dense.onnx", "ceiling.onnx"))
    layers = base.model.config.num_hidden_layers
    assert less.cache_bytes * layers == dense.cache_bytes * (layers - len(ROUTED))
    attention = sum(
        value.nbytes
        for name, value in base.model.named_parameters()
        if value.dim() == 2 and ".self_attn." in name and f".{ROUTED[0]}." in name
    )
    assert dense.weight_bytes - less.weight_bytes == len(ROUTED) * attention


def test_roofline_takes_the_longer_of_both() -> None:
    from mskip.exporters.work import Work

    work = Work(flops=1000, weight_bytes=10, cache_bytes=30)
    assert work.seconds(flops_rate=100, bandwidth=10) == 10
    assert work.seconds(flops_rate=1000, bandwidth=10) == 4


def test_conditional_graph_is_refused(exported: tuple[BaseModel, Path]) -> None:
    from mskip.compressor.errors import ArtifactError
    from mskip.exporters.work import Call, work_of

    with pytest.raises(ArtifactError, match="not a static graph"):
        work_of(exported[1], "model.onnx", Call(1, 1))
