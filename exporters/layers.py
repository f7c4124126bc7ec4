"""Decoder layers as traced bodies, with placeholders for what is routed in them.

Layers of one kind share a body, so that the time of an export hardly grows with their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from mskip.compressor.families import family_of
from mskip.compressor.patching import passing, patched
from mskip.compressor.routing import Call
from mskip.compressor.sublayers import Granularity, Sublayers
from mskip.exporters.arguments import BATCH, PAST, POSITIONS, Arguments, tensors_of
from mskip.exporters.bodies import to_ir, traits
from mskip.exporters.contract import Contract, Target
from mskip.exporters.graph_cache import GraphCache, graph_cache

DOMAIN = "mskip"
LAYER = "Layer"
SUBLAYER = "RoutedSublayer"
DECISION = "RouterDecision"

_AUTO = Dim.DYNAMIC


@dataclass(frozen=True)
class RoutedInputs:
    """What a routed layer needs beside what the model hands it.

    Attributes:
        undecided: whether any decision of the call is open, [] bool.
        prompt_mask: [batch, sequence] int64.
        routing: decisions of the layer, [batch] int64.
        tau: threshold of the layer, [] float32.
        weight: of the layer's router, folded, [hidden] float32.
        bias: of the layer's router, [] float32.
    """

    undecided: Tensor
    prompt_mask: Tensor
    routing: Tensor
    tau: Tensor
    weight: Tensor
    bias: Tensor

    def tensors(self) -> list[Tensor]:
        """In the order of a body's inputs."""
        return [self.undecided, *self.deciding()]

    def deciding(self) -> list[Tensor]:
        """What the decision is taken from, beside the hidden state."""
        return [self.prompt_mask, self.routing, self.tau, self.weight, self.bias]


class _PlacingPass:
    """Leaves a placeholder for the decision and one for the sublayer."""

    def __init__(
        self, given: RoutedInputs, cache: GraphCache, layer: int, granularity: Granularity,
        cache_name: str,
    ) -> None:  # fmt: skip
        self.given = given
        self.cache = cache
        self.layer = layer
        self.granularity = granularity
        self.cache_name = cache_name

    def __call__(self, call: Call) -> Tensor:
        given, hidden = self.given, call.hidden
        rows = (hidden.shape[0],)
        self.gate, self.score, self.some, self.every = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{DECISION}",
            (given.undecided, hidden, *given.deciding()),
            {"layer": self.layer},
            dtypes=(torch.bool, torch.float32, torch.bool, torch.bool),
            shapes=(rows, rows, (), ()),
            version=1,
        )
        return self._placeholder(call)

    def _placeholder(self, call: Call) -> Tensor:
        name = f"{DOMAIN}::{SUBLAYER}"
        attributes: Any = {"layer": self.layer}
        hidden = call.tokens.hidden
        if self.granularity == "mlp":
            return torch.onnx.ops.symbolic(
                name,
                (self.gate, self.some, self.every, hidden),
                attributes,
                dtype=hidden.dtype,
                shape=hidden.shape,
                version=1,
            )
        place = tensors_of(call.tokens.arguments, self.cache_name)
        past_key, past_value = self.cache.past[self.layer]
        heads, dim = past_key.shape[1], past_key.shape[3]
        present = (past_key.shape[0], heads, self.cache.width(hidden.shape[1]), dim)
        output, key, value = torch.onnx.ops.symbolic_multi_out(
            name,
            (self.gate, self.some, self.every, hidden, *place, past_key, past_value),
            attributes,
            dtypes=(hidden.dtype, past_key.dtype, past_value.dtype),
            shapes=(hidden.shape, present, present),
            version=1,
        )
        self.cache.present[self.layer] = (key, value)
        return output


def layer_weights(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """What a layer's body reads, by name, in the order in which it takes it."""
    module = family_of(model).decoder_layers(model)[layer]
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


class _LayerBody(nn.Module):
    """One decoder layer; its weights are arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int,
        arguments: Arguments,
        granularity: Granularity | None,
        target: Target,
    ) -> None:
        super().__init__()
        self.cache = graph_cache(target)
        self.family = family_of(model)
        # Not registered: a parameter of its own would become an initializer of the trace.
        self.__dict__["module"] = self.family.decoder_layers(model)[layer]
        self.names = list(layer_weights(model, layer))
        self.layer = layer
        self.arguments = arguments
        self.granularity = granularity

    def forward(
        self,
        hidden: Tensor,
        place: list[Tensor],
        past: list[Tensor],
        routed: list[Tensor],
        weights: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run the layer; ``routed`` are the tensors of `RoutedInputs`, or none."""
        named = dict(zip(self.names, weights, strict=True))
        cache = self.cache([(past[0], past[1])] * (self.layer + 1), past[0].shape[2])
        routing = None
        if self.granularity is not None:
            routing = _PlacingPass(
                RoutedInputs(*routed), cache, self.layer, self.granularity, self.arguments.cache
            )
        arguments = self.arguments.filled(place, cache)
        with passing(routing):
            output = torch.func.functional_call(
                self.__dict__["module"], named, (hidden,), arguments
            )
        present = cache.present[self.layer]
        assert present is not None
        decided = () if routing is None else (routing.gate, routing.score)
        return (self.family.hidden_of(output), *present, *decided)


def trace_layers(
    model: PreTrainedModel,
    sublayers: Sublayers,
    contract: Contract,
    arguments: dict[int, Arguments],
) -> dict[int, ir.Model]:
    """The bodies of all decoder layers; layers of one kind share theirs.

    Args:
        model: a supported causal LM, not patched, on the CPU.
        sublayers: what is routed.
        contract: the routed graph's contract.
        arguments: how the model calls its layers, see `layer_arguments`.
    """
    known: dict[Any, ir.Model] = {}
    bodies = {}
    for layer, module in enumerate(family_of(model).decoder_layers(model)):
        routed = layer in sublayers.layers
        key = routed, traits(module)
        if key not in known:
            kind = sublayers.granularity if routed else None
            alone = Sublayers([layer] if routed else [], sublayers.granularity)
            with patched(model, alone):
                known[key] = _trace(model, layer, contract, arguments[layer], kind)
        bodies[layer] = known[key]
    return bodies


def _trace(
    model: PreTrainedModel,
    layer: int,
    contract: Contract,
    arguments: Arguments,
    granularity: Granularity | None,
) -> ir.Model:
    weights = layer_weights(model, layer)
    dtype, hidden = model.dtype, model.config.get_text_config().hidden_size
    # A routed sublayer's keys belong to the executing rows, a number of their own.
    rows = 2 if layer in contract.compact_layers else BATCH
    shape = rows, contract.kv_heads, PAST, contract.head_dim
    routed: list[Tensor] = []
    if granularity is not None:
        routed = RoutedInputs(
            torch.tensor(True),
            torch.ones(BATCH, POSITIONS, dtype=torch.int64),
            torch.ones(BATCH, dtype=torch.int64),
            torch.tensor(0.5),
            torch.zeros(hidden),
            torch.zeros(()),
        ).tensors()
    args = (
        torch.zeros(BATCH, POSITIONS, hidden, dtype=dtype),
        arguments.examples,
        [torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)],
        routed,
        list(weights.values()),
    )
    two, kv = {0: _AUTO, 1: _AUTO}, {0: _AUTO, 2: _AUTO}
    shapes = (
        two, arguments.dynamic_axes(), [kv, kv],
        [None, two, {0: _AUTO}, None, None, None][: len(routed)], [None] * len(weights),
    )  # fmt: skip
    inputs = ["hidden", *(f"place.{number}" for number in range(len(arguments.examples)))]
    inputs += ["past_key", "past_value"]
    outputs = ["output", "present_key", "present_value"]
    if routed:
        inputs += ["undecided", "prompt_mask", "routing", "tau", "router_weight", "router_bias"]
        outputs += ["gate", "score"]
    body = _LayerBody(model, layer, arguments, granularity, contract.target)
    traced = to_ir(body, args, shapes, ([*inputs, *weights], outputs), contract.opset)
    _measure_hidden(traced.graph)
    return traced


def _measure_hidden(graph: ir.Graph) -> None:
    """Take sizes from the hidden state: graphs without routing lack the inputs of routing."""
    values = {value.name: value for value in graph.inputs}
    for name in ("prompt_mask", "routing"):
        for use in list(values[name].uses()) if name in values else ():
            if use.node.op_type == "Shape":  # of the same axis: batch first, then sequence
                use.node.replace_input_with(use.idx, values["hidden"])
