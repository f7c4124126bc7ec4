"""The forms that ONNX Runtime's fused kernels take, while a model is traced.

The attention becomes one `GroupQueryAttention` (domain ``com.microsoft``, ONNX Runtime's
ContribOperators.md): it reads keys and values of a buffer with room for more positions than are
in it, and writes the new ones in place where past and present are the same memory. The mask that
the model hands to its layers is then two numbers a sequence, not a table of positions. Rotary
embedding and a root-mean-square norm become one node each (ONNX operator set 23).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.exporters.attention_choice import attention_as, require_choice
from mskip.exporters.graph_cache import PENDING

NAME = "mskip_fused"
OPSET = 23
"""The first that has RotaryEmbedding."""

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def _lengths(attention_mask: Tensor, **_: Any) -> Tensor:
    """In the place of a mask: real tokens less one, and columns; [batch, 2] int32."""
    # Sums of booleans are int64 in PyTorch; the kernel wants int32.
    last = attention_mask.sum(dim=1).to(torch.int32) - 1
    columns = torch.full_like(last, attention_mask.shape[1])
    return torch.stack([last, columns], dim=1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over past and new positions, [batch, sequence, heads, head dim]."""
    cache, layer = PENDING.get()
    past_key, past_value = cache.past[layer]
    batch, heads, new, dim = query.shape

    def flat(states: Tensor) -> Tensor:
        return states.transpose(1, 2).reshape(states.shape[0], states.shape[2], -1)

    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1]}
    attributes["scale"] = float(dim**-0.5 if scaling is None else scaling)
    if sliding_window is not None:
        attributes["local_window_size"] = int(sliding_window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{MICROSOFT}::GroupQueryAttention",
        (
            flat(query), flat(key), flat(value), past_key, past_value,
            attention_mask[:, 0], attention_mask[:1, 1].reshape(()), *_sinks(others),
        ),
        attributes,
        dtypes=(query.dtype, past_key.dtype, past_value.dtype),
        shapes=((batch, new, heads * dim), past_key.shape, past_value.shape),
        version=1,
    )  # fmt: skip
    cache.present[layer] = (present_key, present_value)
    return output.reshape(batch, new, heads, dim), None


def _sinks(others: dict[str, Any]) -> list[Tensor | None]:
    """A learned logit of each head that no value belongs to (gpt-oss), where there is one."""
    sinks = others.get("s_aux")
    # Before it: two rotary tables, positions, a bias of the scores.
    return [] if sinks is None else [None, None, None, None, sinks]


def _rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One rotary embedding, [batch, heads, sequence, head dim]; halves, not pairs, are rotated."""
    half = cos.shape[-1] // 2
    batch, heads, new, dim = states.shape
    # As it comes from the projection, where it was transposed: the runtime cancels the two.
    flat = states.transpose(1, 2).reshape(batch, new, heads * dim)
    turned = torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        (flat, cos[..., :half], sin[..., :half]),
        {"num_heads": heads},
        dtype=flat.dtype,
        shape=flat.shape,
        version=OPSET,
    )
    return turned.reshape(batch, new, heads, dim).transpose(1, 2)


def _rotated_whole(function: Any) -> bool:
    """Whether a modelling file's function turns all of a head in halves, by trying it."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    angles = torch.randn(2, 5, 4, generator=generator)
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    try:
        found = function(query, key, cos, sin)
    except Exception:  # another signature: it stays as it is
        return False

    def expected(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
        return states * cos.unsqueeze(1) + other * sin.unsqueeze(1)

    return (
        isinstance(found, tuple)
        and len(found) == 2
        and torch.allclose(found[0], expected(query), atol=1e-6)
        and torch.allclose(found[1], expected(key), atol=1e-6)
    )


def _norm_offset(module: nn.Module) -> float | None:
    """What is added to the weight of a root-mean-square norm; None of anything else, by trying."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or epsilon is None:
        return None
    if list(module.parameters()) != [weight]:
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, len(weight), generator=generator).to(weight.dtype)
    try:
        with torch.no_grad():
            found = module(states).float()
    except Exception:  # another signature
        return None
    wide = states.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    precision = 1e-5 if weight.dtype == torch.float32 else 3e-2
    for offset in (0.0, 1.0):
        expected = normal * (weight.detach().float() + offset)
        if torch.allclose(found, expected, atol=precision, rtol=precision):
            return offset
    return None


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _normalised(module: nn.Module, offset: float, states: Tensor) -> Tensor:
    """A root-mean-square norm as one node, computed in float32."""
    weight, epsilon = module.weight, _epsilon(module)
    assert isinstance(weight, Tensor)
    assert epsilon is not None
    normal: Tensor = torch.onnx.ops.symbolic(
        "RMSNormalization",
        (states, weight + offset if offset else weight),
        {"axis": -1, "epsilon": epsilon, "stash_type": 1},
        dtype=states.dtype,
        shape=states.shape,
        version=OPSET,
    )
    return normal


@contextlib.contextmanager
def _fused_norms(model: PreTrainedModel) -> Iterator[None]:
    """Root-mean-square norms leave one node each for the duration of the block."""
    found = [(module, _norm_offset(module)) for module in model.modules()]
    norms = [(module, offset) for module, offset in found if offset is not None]
    for module, offset in norms:
        # On the instance, where it hides the class's.
        module.forward = partial(_normalised, module, offset)
    try:
        yield
    finally:
        for module, _ in norms:
            del module.forward


@contextlib.contextmanager
def fused_forms(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention and rotary embedding leave fused nodes for the duration of the block.

    Raises:
        ModelError: the architecture does not let its attention be chosen.
    """
    require_choice(model, "it has no fused form", "Export without --target ort.")
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    name = "apply_rotary_pos_emb"
    whole = [m for m in modules if hasattr(m, name) and _rotated_whole(getattr(m, name))]
    saved = [getattr(module, name) for module in whole]

    def turning(function: Any) -> Any:
        def both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
            if cos.shape[-1] != query.shape[-1]:  # a part of the head only
                return function(query, key, cos, sin, *rest)
            return _rotary(query, cos, sin), _rotary(key, cos, sin)

        return both

    for module, function in zip(whole, saved, strict=True):
        setattr(module, name, turning(function))
    try:
        with attention_as(model, NAME, _attention, _lengths), _fused_norms(model):
            yield
    finally:
        for module, function in zip(whole, saved, strict=True):
            setattr(module, name, function)
