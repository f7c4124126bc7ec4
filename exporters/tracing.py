"""From transformers' own modules to ONNX parts, once each.

The model is traced with every decoder layer replaced by a placeholder node (the *trunk*:
embedding, masks, rotary tables, final norm, head). A layer is traced by itself with its
weights as inputs and serves every layer of its kind; it leaves placeholders for what is
routed in it. The sublayers and the router's decision are bodies too. Lowering puts the parts
together: the same trace gives the routed, the dense and the static graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mskip.compressor.router import Routers
from mskip.compressor.routing import UNDECIDED
from mskip.compressor.standins import layers_replaced
from mskip.exporters.arguments import (
    BATCH,
    PAST,
    POSITIONS,
    layer_arguments,
    sublayer_arguments,
    tensors_of,
)
from mskip.exporters.bodies import Body, to_ir, trace_bodies, trace_decision
from mskip.exporters.contract import WITH_CAPACITY, Contract, Target
from mskip.exporters.experts import NAME
from mskip.exporters.fused import fused_forms
from mskip.exporters.graph_cache import BufferCache, buffer_mask, graph_cache
from mskip.exporters.layers import DOMAIN, LAYER, RoutedInputs, layer_weights, trace_layers
from mskip.exporters.routed_ops import routed_forms
from mskip.exporters.splicing import bound, initializer, moved, substitute

Caches = list[tuple[Tensor, Tensor]]


@dataclass
class Traced:
    """Parts of the graph.

    Attributes:
        trunk: the whole model with placeholders for sublayers and decisions; its weights are
            read from the model when they are written.
        bodies: what runs at a placeholder, by the decoder layer.
        decision: body of a router's decision.
        contract: names and axes.
    """

    trunk: ir.Model
    bodies: dict[int, Body]
    decision: ir.Model
    contract: Contract


class _Trunk(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(
        self, model: PreTrainedModel, routers: Routers, cache_name: str, contract: Contract
    ) -> None:
        super().__init__()
        self.cache = graph_cache(contract.target)
        self.model = model
        self.layers = routers.layers
        self.compact = contract.compact_layers
        self.cache_name = cache_name
        weight, bias = routers.folded()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        routing: Tensor,
        tau: Tensor,
        past: Caches,
        logits_at: Tensor | None = None,
    ) -> Any:
        positions = input_ids.shape[1]
        # A layer whose cache has a row for every sequence: its length is the model's.
        whole = next(i for i in range(len(past)) if i not in self.compact)
        cache = self.cache(past, past[whole][0].shape[2])
        cache.positions = position_ids
        undecided = (routing == UNDECIDED).any()
        prompt_mask = attention_mask[:, -positions:]
        if isinstance(cache, BufferCache):  # the mask is of the buffers' positions
            prompt_mask = attention_mask.gather(1, position_ids)
        gates: list[Tensor] = []
        scores: list[Tensor] = []

        def placeholder(layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            routed: list[Tensor] = []
            if layer in self.layers:
                index = self.layers.index(layer)
                routed = RoutedInputs(
                    undecided, prompt_mask, routing[:, index], tau[index], self.weight[index],
                    self.bias[index],
                ).tensors()  # fmt: skip
            key, value = past[layer]
            present = key.shape[0], key.shape[1], cache.width(hidden.shape[1]), key.shape[3]
            decided = [(torch.bool, hidden.shape[:1]), (torch.float32, hidden.shape[:1])]
            results = [(hidden.dtype, hidden.shape), (key.dtype, present), (key.dtype, present)]
            results += decided if routed else []
            output, new_key, new_value, *rest = torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{LAYER}",
                (hidden, *tensors_of(arguments, self.cache_name), key, value, *routed),
                {"layer": layer},
                dtypes=[dtype for dtype, _ in results],
                shapes=[shape for _, shape in results],
                version=1,
            )
            cache.present[layer] = (new_key, new_value)
            if routed:
                gates.append(rest[0])
                scores.append(rest[1])
            return output

        with layers_replaced(self.model, placeholder), _logits_at(self.model, logits_at):
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).logits
        decided = torch.stack(gates, dim=1).to(torch.int64)
        return logits, decided, torch.stack(scores, dim=1), cache.present


@contextlib.contextmanager
def _logits_at(model: PreTrainedModel, columns: Tensor | None) -> Iterator[None]:
    """The head sees only the columns [batch, kept] that are asked for; None for all."""
    if columns is None:
        yield
        return

    def chosen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (hidden,) = inputs
        index = columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index),)

    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    hook = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _decomposed(model: PreTrainedModel) -> Iterator[None]:
    """Attention of standard operators, with a table as its mask."""
    # Eager: a mask of finite numbers, so a fully padded query row gives garbage that nobody
    # reads, where -inf would give NaN that spreads.
    attention = model.config._attn_implementation
    _attend_with(model, "eager")
    try:
        yield
    finally:
        _attend_with(model, attention)


@contextlib.contextmanager
def _traceable(model: PreTrainedModel, target: Target) -> Iterator[None]:
    """The forms of attention and of experts that a trace can hold."""
    experts = model.config._experts_implementation
    if experts is not None:
        model.set_experts_implementation(NAME)
    try:
        with _FORMS.get(target, _decomposed)(model), _masks(target):
            yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)


@contextlib.contextmanager
def _masks(target: Target) -> Iterator[None]:
    """Masks of buffers are tables of their positions; the library's do not know such buffers."""
    if target not in WITH_CAPACITY:
        yield
        return
    usual = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    AttentionMaskInterface.register("eager", buffer_mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register("eager", usual)


_FORMS: dict[Target, Callable[[PreTrainedModel], AbstractContextManager[None]]] = {
    "ort": fused_forms,
    "trt-plugin": routed_forms,
}


def _attend_with(model: PreTrainedModel, implementation: str) -> None:
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation(implementation)
    else:  # Falcon's attention looks at the configuration in each call.
        model.config._attn_implementation = implementation


def trace(model: PreTrainedModel, routers: Routers, contract: Contract) -> Traced:
    """Trace the parts.

    Args:
        model: a supported causal LM on the CPU.
        routers: its routers.
        contract: the routed graph's contract.
    """
    sublayers = routers.sublayers
    cache = graph_cache(contract.target)
    with _traceable(model, contract.target):
        given = layer_arguments(model, cache(_caches(model, routers, contract), PAST))
        layers = trace_layers(model, sublayers, contract, given)
        inner = {
            layer: sublayer_arguments(
                model, sublayers, layer, given[layer],
                cache(_caches(model, routers, contract), PAST),
            )
            for layer in sublayers.layers
        }  # fmt: skip
        bodies = trace_bodies(model, sublayers, contract, inner)
        trunk = _trace_trunk(model, routers, contract, next(iter(given.values())).cache)
    _inline_layers(trunk, layers, model)
    return Traced(trunk, bodies, trace_decision(model, contract), contract)


def _caches(model: PreTrainedModel, routers: Routers, contract: Contract) -> Caches:
    """Examples of past keys and values; a routed layer has those of some rows only."""
    rows = [2 if i in contract.compact_layers else BATCH for i in range(contract.layers)]
    # Two tensors: the exporter takes one object given twice for one input.
    key, value = (
        [
            torch.zeros(n, contract.kv_heads, PAST, contract.head_dim, dtype=model.dtype)
            for n in rows
        ]
        for _ in range(2)
    )
    return list(zip(key, value, strict=True))


def _trace_trunk(
    model: PreTrainedModel, routers: Routers, contract: Contract, cache_name: str
) -> ir.Model:
    routed = len(routers.layers)
    caches = _caches(model, routers, contract)
    seen = PAST if contract.target in WITH_CAPACITY else PAST + POSITIONS
    args: tuple[Any, ...] = (
        torch.zeros(BATCH, POSITIONS, dtype=torch.int64),
        torch.ones(BATCH, seen, dtype=torch.int64),
        torch.arange(PAST, PAST + POSITIONS).expand(BATCH, -1).contiguous(),
        torch.ones(BATCH, routed, dtype=torch.int64),
        torch.full((routed,), 0.5),
        caches,
    )
    auto = Dim.DYNAMIC
    kv, two = {0: auto, 2: auto}, {0: auto, 1: auto}
    shapes: tuple[Any, ...] = (two, two, two, {0: auto}, None, [(kv, kv) for _ in caches])
    inputs = [spec.name for spec in contract.inputs()]
    if contract.buffered:
        args = (*args, torch.zeros(BATCH, 2, dtype=torch.int64))
        shapes = (*shapes, two)
        inputs.remove("logits_at")  # it is the last argument
        inputs.append("logits_at")
    names = inputs, [spec.name for spec in contract.outputs()]
    trunk = _Trunk(model, routers, cache_name, contract)
    return to_ir(trunk, args, shapes, names, contract.opset)


def _inline_layers(trunk: ir.Model, layers: dict[int, ir.Model], model: PreTrainedModel) -> None:
    """Put the layers' bodies in the places of their placeholders."""
    graph = trunk.graph
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == LAYER]:
        layer = node.attributes["layer"].as_int()
        weights = []
        for name, parameter in layer_weights(model, layer).items():
            value = initializer(f"layers.{layer}.{name}", parameter)
            graph.register_initializer(value)
            weights.append(value)
        inputs = [value for value in node.inputs if value is not None]
        body = bound(layers[layer], [*inputs, *weights], f"layers.{layer}/")
        for inner in body:
            if inner.domain == DOMAIN and "layer" in inner.attributes:
                inner.attributes["layer"] = ir.AttrInt64("layer", layer)
        outputs = list(body.outputs)
        graph.insert_before(node, moved(body, graph))
        substitute(graph, node, outputs)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
