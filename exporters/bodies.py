"""What stands at a routed sublayer, traced by itself with its weights as inputs.

A body serves every layer of the same shape, so that the time of a trace and
the size of what is held do not grow with the number of routed layers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from mskip.compressor.compensation import low_rank_map
from mskip.compressor.errors import ModelError
from mskip.compressor.families import family_of
from mskip.compressor.router import prompt_mean
from mskip.compressor.routing import UNDECIDED
from mskip.compressor.sublayers import Sublayers
from mskip.exporters.arguments import BATCH, PAST, POSITIONS, Arguments
from mskip.exporters.contract import Contract, Target
from mskip.exporters.graph_cache import graph_cache
from mskip.exporters.tidying import cancel_reshapes

# Folding may compute shapes, never weights: a folded weight is a second copy.
_FOLD_LIMIT = 4096
_AUTO = Dim.DYNAMIC
_NEWEST = 23
"""Opset that torch.onnx can write; a target that needs nodes of a later one puts them in itself."""


def to_ir(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, names: tuple[list[str], list[str]],
    opset: int,
) -> ir.Model:  # fmt: skip
    """Export a module with torch.onnx and fold what is constant.

    Args:
        module: what to export.
        args: example arguments.
        shapes: dynamic axes, in the form of `torch.export`.
        names: of inputs and outputs.
        opset: ONNX opset.
    """
    # One warning for each torchvision operator that is not there, and nobody needs.
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad(),
        _operators_once(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names[0],
            output_names=names[1],
            opset_version=min(opset, _NEWEST),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_LIMIT, output_size_limit=1 << 16)
    cancel_reshapes(model.graph)
    common.RemoveUnusedNodesPass()(model)
    return model


@contextlib.contextmanager
def _operators_once() -> Iterator[None]:
    """torch.onnx reads the sources of its operators anew for each export, a second every time.

    Here they are read for the first one, where this version of torch has them in the known place.
    """
    kind = getattr(
        importlib.import_module("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None
    )
    original = vars(kind).get("from_torchlib") if kind is not None else None
    if kind is None or original is None:
        yield
        return
    kind.from_torchlib = staticmethod(_remembering(kind.from_torchlib))
    try:
        yield
    finally:
        kind.from_torchlib = original


@functools.cache
def _remembering(read: Callable[..., Any]) -> Callable[..., Any]:
    return functools.cache(read)


def body_weights(model: PreTrainedModel, sublayers: Sublayers, layer: int) -> dict[str, Tensor]:
    """What a routed layer's body reads, by name, in the order in which it takes it.

    The parameters of the sublayer, ``post_norm.`` those of the norm after it where there is
    one, then ``compensation.down``, ``.up`` and ``.bias`` where a skip is compensated.
    """
    family, kind = family_of(model), sublayers.granularity
    module = family.sublayer_of(model, layer, kind)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    after = family.post_norm_of(model, layer, kind)
    if after is not None:
        weights.update({f"post_norm.{name}": p.detach() for name, p in after.named_parameters()})
    if sublayers.compensation is not None:
        parts = sublayers.compensation.parts(sublayers.layers.index(layer))
        weights.update({f"compensation.{name}": part.detach() for name, part in parts.items()})
    return weights


@dataclass(frozen=True)
class Body:
    """A routed sublayer's traces.

    Attributes:
        execute: runs the sublayer on all rows of what it is given.
        skip: what it gives where it is skipped, for all rows; None where that is nothing
            (attention, MLP) or the residual stream itself (block).
        shared: which of the sublayer's tensor arguments are the same for all rows.
        mask: number of the argument whose last axis is past + sequence; None where there is
            none: of an MLP, and with buffers of keys and values.
    """

    execute: ir.Model
    skip: ir.Model | None
    shared: list[bool]
    mask: int | None


class _Skip:
    """What a skipped sublayer gives, from the weights of its body."""

    def __init__(self, model: PreTrainedModel, sublayers: Sublayers, layer: int) -> None:
        self.kind = sublayers.granularity
        self.compensated = sublayers.compensation is not None
        family = family_of(model)
        self.norm = family.norm_of(model, layer, self.kind)
        block = family.sublayer_of(model, layer, "block")
        names = [name for name, module in block.named_modules() if module is self.norm]
        self.norm_weights = f"{names[0]}." if names else ""

    def __call__(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        block = self.kind == "block"
        if not self.compensated:
            return hidden if block else torch.zeros_like(hidden)
        inner = hidden
        if block and self.norm is not None:
            named = {
                name.removeprefix(self.norm_weights): value
                for name, value in weights.items()
                if name.startswith(self.norm_weights)
            }
            inner = torch.func.functional_call(self.norm, named, (hidden,))
        part = {name: weights.get(f"compensation.{name}") for name in ("down", "up", "bias")}
        assert part["down"] is not None
        assert part["bias"] is not None
        instead = low_rank_map(inner, part["down"], part["up"], part["bias"])
        return hidden + instead if block else instead


class _SublayerBody(nn.Module):
    """One sublayer; its weights are arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        sublayers: Sublayers,
        layer: int,
        arguments: Arguments,
        target: Target,
    ) -> None:
        super().__init__()
        self.cache = graph_cache(target)
        self.family = family_of(model)
        self.kind = sublayers.granularity
        # Not registered: a parameter of its own would become an initializer of the trace.
        self.__dict__["sublayer"] = self.family.sublayer_of(model, layer, self.kind)
        self.__dict__["post_norm"] = self.family.post_norm_of(model, layer, self.kind)
        self.arguments = arguments
        self.names = list(body_weights(model, sublayers, layer))
        self.layer = layer

    def forward(
        self, hidden: Tensor, place: list[Tensor], past: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the sublayer.

        Args:
            hidden: its input, [batch, sequence, hidden]; of a block the residual stream.
            place: the tensors among its arguments: rotary tables, [batch, sequence, dim], the
                mask, [batch, 1, sequence, past + sequence], and what else the architecture
                hands on; nothing for an MLP.
            past: keys and values, [batch, kv heads, past, head dim]; nothing for an MLP.
            weights: see `body_weights`.

        Returns:
            The output, and the present keys and values.
        """
        named = dict(zip(self.names, weights, strict=True))
        own = {n: v for n, v in named.items() if not n.startswith(("compensation.", "post_norm."))}
        cache = None
        if self.kind != "mlp":
            cache = self.cache([(past[0], past[1])] * (self.layer + 1), past[0].shape[2])
        output = torch.func.functional_call(
            self.__dict__["sublayer"], own, (hidden,), self.arguments.filled(place, cache)
        )
        if self.kind == "attention":
            output = output[0]
        elif self.kind == "block":
            output = self.family.hidden_of(output)
        after = self.__dict__["post_norm"]
        if after is not None:
            prefix = "post_norm."
            norm = {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
            output = torch.func.functional_call(after, norm, (output,))
        if cache is None:
            return (output,)
        present = cache.present[self.layer]
        assert present is not None
        return (output, *present)


class _SkipBody(nn.Module):
    def __init__(self, model: PreTrainedModel, sublayers: Sublayers, layer: int) -> None:
        super().__init__()
        self.names = list(body_weights(model, sublayers, layer))
        self.skip = _Skip(model, sublayers, layer)

    def forward(self, hidden: Tensor, weights: list[Tensor]) -> Tensor:
        return self.skip(hidden, dict(zip(self.names, weights, strict=True)))


class _DecisionBody(nn.Module):
    def forward(
        self,
        hidden: Tensor,
        prompt_mask: Tensor,
        routing: Tensor,
        tau: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:
        score = torch.sigmoid(prompt_mean(hidden, prompt_mask) @ weight + bias)
        # Not `where`: ONNX Runtime has none for booleans.
        gate = ((routing == UNDECIDED) & (score >= tau)) | (routing > 0)
        return gate, score, gate.any(), gate.all()


def trace_bodies(
    model: PreTrainedModel,
    sublayers: Sublayers,
    contract: Contract,
    arguments: dict[int, Arguments],
) -> dict[int, Body]:
    """The bodies of the routed layers, by decoder layer; layers of one shape share theirs.

    Args:
        model: a supported causal LM, not patched, on the CPU.
        sublayers: what is routed.
        contract: the routed graph's contract.
        arguments: how the model calls them, see `record_arguments`.
    """
    unmasked = sublayers.granularity == "mlp" or contract.buffered
    known: dict[Any, Body] = {}
    bodies = {}
    for layer in sublayers.layers:
        key = _shape_of(model, sublayers, layer)
        if key not in known:
            compensated = sublayers.compensation is not None
            given = arguments[layer]
            known[key] = Body(
                _trace(model, sublayers, layer, contract, given),
                _trace_skip(model, sublayers, layer, contract) if compensated else None,
                [tensor.shape[0] != BATCH for tensor in given.examples],
                None if unmasked else _mask_of(given, layer),
            )
        bodies[layer] = known[key]
    return bodies


def _mask_of(given: Arguments, layer: int) -> int:
    for number, tensor in enumerate(given.examples):
        if tensor.shape[-1] == PAST + POSITIONS:
            return number
    raise ModelError(
        f"decoder layer {layer} is handed no attention mask, by which a graph with padded rows "
        "would know them; such a model cannot be exported."
    )


def _shape_of(model: PreTrainedModel, sublayers: Sublayers, layer: int) -> tuple[Any, ...]:
    """What makes two layers' sublayers the same body: classes, settings and weights' shapes."""
    family, kind = family_of(model), sublayers.granularity
    modules = [family.sublayer_of(model, layer, kind), family.post_norm_of(model, layer, kind)]
    return tuple(traits(module) for module in modules if module is not None)


def traits(module: nn.Module) -> tuple[Any, ...]:
    """What makes two modules compute the same but for their weights, hashable."""
    # Settings such as a layer's window, scale, or whether it rotates, are plain attributes.
    settings = [
        (path, type(part), name, value)
        for path, part in module.named_modules()
        for name, value in sorted(vars(part).items())
        if name != "layer_idx" and isinstance(value, bool | int | float | str | None)
    ]
    weights = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    return type(module), tuple(settings), tuple(weights)


def _trace(
    model: PreTrainedModel,
    sublayers: Sublayers,
    layer: int,
    contract: Contract,
    arguments: Arguments,
) -> ir.Model:
    weights = body_weights(model, sublayers, layer)
    dim, heads, dtype = contract.head_dim, contract.kv_heads, model.dtype
    hidden = model.config.get_text_config().hidden_size
    cached = sublayers.granularity != "mlp"
    caches = [torch.zeros(BATCH, heads, PAST, dim, dtype=dtype) for _ in range(2 if cached else 0)]
    args = (
        torch.zeros(BATCH, POSITIONS, hidden, dtype=dtype),
        arguments.examples,
        caches,
        list(weights.values()),
    )
    shapes = (
        {0: _AUTO, 1: _AUTO}, arguments.dynamic_axes(), [{0: _AUTO, 2: _AUTO} for _ in caches],
        [None] * len(weights),
    )  # fmt: skip
    inputs = ["hidden", *(f"place.{number}" for number in range(len(arguments.examples)))]
    inputs += ["past_key", "past_value"] if cached else []
    outputs = ["output", "present_key", "present_value"] if cached else ["output"]
    body = _SublayerBody(model, sublayers, layer, arguments, contract.target)
    return to_ir(body, args, shapes, ([*inputs, *weights], outputs), contract.opset)


def _trace_skip(
    model: PreTrainedModel, sublayers: Sublayers, layer: int, contract: Contract
) -> ir.Model:
    weights = body_weights(model, sublayers, layer)
    hidden = model.config.get_text_config().hidden_size
    args = (torch.zeros(BATCH, POSITIONS, hidden, dtype=model.dtype), list(weights.values()))
    shapes = ({0: _AUTO, 1: _AUTO}, [None] * len(weights))
    names = ["hidden", *weights], ["output"]
    return to_ir(_SkipBody(model, sublayers, layer), args, shapes, names, contract.opset)


def trace_decision(model: PreTrainedModel, contract: Contract) -> ir.Model:
    """The body of a layer's decision: gates and scores, [batch], and whether any, all execute."""
    hidden = model.config.get_text_config().hidden_size
    args = (
        torch.zeros(3, 5, hidden, dtype=model.dtype),
        torch.ones(3, 5, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
        torch.tensor(0.5),
        torch.zeros(hidden),
        torch.zeros(()),
    )
    two = {0: _AUTO, 1: _AUTO}
    inputs = ["hidden", "prompt_mask", "routing", "tau", "weight", "bias"]
    outputs = ["gate", "score", "some", "every"]
    shapes = (two, two, {0: _AUTO}, None, None, None)
    return to_ir(_DecisionBody(), args, shapes, (inputs, outputs), contract.opset)
