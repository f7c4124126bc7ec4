"""Mixtures of experts in a trace: every expert on the tokens that it is given, and on no others.

transformers' own loop looks at the data to see which experts are hit, which a trace cannot; its
other forms gather weights a token, or use kernels that ONNX has not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "mskip_one_by_one"


def one_by_one(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """See `transformers.integrations.moe`.

    Args:
        experts: module with the experts' weights, [experts, out, in] each.
        hidden_states: [tokens, hidden].
        top_k_index: experts of each token, [tokens, k] int64.
        top_k_weights: their weights, same shape.

    Returns:
        [tokens, hidden].
    """
    output = torch.zeros_like(hidden_states)
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    for number in range(up.shape[0]):
        chosen = top_k_index == number
        tokens = chosen.any(dim=-1).nonzero().squeeze(1)
        weight = (top_k_weights * chosen).sum(dim=-1)[tokens]
        inner = _linear(experts, hidden_states[tokens], "gate_up_proj", number)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        result = _linear(experts, inner, "down_proj", number) * weight[:, None]
        output = output.index_put((tokens,), result.to(output.dtype), accumulate=True)
    return output


def _linear(experts: Any, inputs: Tensor, name: str, number: int) -> Tensor:
    if name == "gate_up_proj" and not experts.has_gate:
        name = "up_proj"
    weight = getattr(experts, name)[number]
    result: Tensor = inputs @ (weight if experts.is_transposed else weight.T)
    return result + getattr(experts, f"{name}_bias")[number] if experts.has_bias else result


ALL_EXPERTS_FUNCTIONS.register(NAME, one_by_one)
