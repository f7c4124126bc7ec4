"""Per-token routing by a Llama written out by hand, one sequence at a time, in float64.

The oracle computes full attention, hides the keys of skipped tokens and zeroes their output.
It shares the model's weights and nothing else with what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from by_hand import LAYERS, MakeRouters
from torch import Tensor
from transformers import LlamaForCausalLM

from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Batch
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import Granularity, Sublayers


def close(actual: Tensor, expected: Tensor) -> None:
    """The rotary tables are float32 whatever the model is: not closer than this."""
    bound = 1e-5 if actual.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(actual, expected.to(actual), rtol=bound, atol=bound)


def routers_for(
    model: LlamaForCausalLM,
    tiny_routers: MakeRouters,
    granularity: Granularity = "attention",
    rank: int = 0,
    layers: list[int] = LAYERS,
) -> Routers:
    """Routers with mixed decisions, of a granularity, with a random compensation of a rank."""
    width = model.config.hidden_size
    compensation = None
    if rank:
        compensation = Compensation(len(layers), width, rank).requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        for parameter in compensation.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    routers = Routers(Sublayers(layers, granularity, compensation, "token"), width)
    routers.load_state_dict(tiny_routers(model, layers).state_dict())
    return routers.requires_grad_(False)


@dataclass
class Plain:
    """One sequence: logits [sequence, vocabulary], decisions and logits of the routers."""

    logits: Tensor
    decisions: Tensor  # [sequence, routed] bool
    router_logits: Tensor  # [sequence, routed]


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [sequence, heads, dim] at positions 0, 1, ..."""
    length, _, dim = x.shape
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (torch.arange(length).double()[:, None] * frequency)[:, None, :]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_attention(block: Any, x: Tensor, visible: Tensor, theta: float) -> Tensor:
    """Attention over [sequence, hidden] with the keys of ``visible`` and a token's own."""
    attention, length = block.self_attn, len(x)
    q, k, v = (
        F.linear(x, getattr(attention, name).weight).view(length, -1, attention.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = rotate(q, theta), rotate(k, theta)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    weight = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(attention.head_dim)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & (visible | torch.eye(length, dtype=torch.bool))
    mixed = torch.einsum("hqk,khd->qhd", weight.masked_fill(~seen, -math.inf).softmax(-1), v)
    return F.linear(mixed.reshape(length, -1), attention.o_proj.weight)


def plain(
    model: LlamaForCausalLM,
    routers: Routers,
    ids: Tensor,
    tau: float = 0.5,
    mix: Tensor | None = None,
) -> Plain:
    """Run [sequence] ids by hand.

    ``mix`` ([sequence, routed]) takes the place of the gates where outputs are mixed; what is
    decided, and what later tokens see, stays as the routers have it.
    """
    sublayers = routers.sublayers
    kind, compensation = sublayers.granularity, sublayers.compensation
    weight, bias = (t.double() for t in routers.folded())
    theta = model.config.rope_parameters["rope_theta"]
    hidden = model.model.embed_tokens.weight[ids]
    gates, found = [], []
    for layer, block in enumerate(model.model.layers):
        routed = sublayers.layers.index(layer) if layer in sublayers.layers else None
        all_ = torch.ones(len(ids), dtype=torch.bool)

        def gate(
            x: Tensor, here: bool, routed: int | None = routed, all_: Tensor = all_
        ) -> tuple[Tensor, Tensor]:
            """Who executes, and by what its output is mixed."""
            if routed is None or not here:
                return all_, all_.double()[:, None]
            found.append(x @ weight[routed] + bias[routed])
            gates.append(torch.sigmoid(found[-1]) >= tau)
            given = gates[-1].double() if mix is None else mix[:, routed]
            return gates[-1], given[:, None]

        def instead(x: Tensor, routed: int | None = routed) -> Tensor:
            if compensation is None or routed is None:
                return torch.zeros_like(x)
            down = compensation.down[routed].double()
            up = down if compensation.up is None else down @ compensation.up[routed].double()
            return x @ up + compensation.bias[routed].double()

        x = block.input_layernorm(hidden)
        in_block, block_mix = gate(x, kind == "block")
        before, block_instead = hidden, instead(x)
        executes, attention_mix = gate(x, kind == "attention")
        out = plain_attention(block, x, executes & in_block, theta)
        hidden = hidden + out * attention_mix + instead(x) * (1 - attention_mix)
        x = block.post_attention_layernorm(hidden)
        _, mlp_mix = gate(x, kind == "mlp")
        hidden = hidden + block.mlp(x) * mlp_mix + instead(x) * (1 - mlp_mix)
        hidden = hidden * block_mix + (before + block_instead) * (1 - block_mix)
    logits = model.lm_head(model.model.norm(hidden))
    return Plain(logits, torch.stack(gates, dim=1), torch.stack(found, dim=1))


Oracle = Callable[..., Plain]


def prompt_of(batch: Batch, row: int) -> Tensor:
    """One prompt without its padding, [length]."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()]
