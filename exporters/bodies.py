"""What stands at a routed sublayer, traced by itself with its weights as inputs.

A body serves every layer of the same shape, so that the time of a trace and
the size of what is held do not grow with the number of routed layers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from mskip.compressor.compensation import low_rank_map
from mskip.compressor.families import family_of
from mskip.compressor.router import prompt_mean
from mskip.compressor.sublayers import Sublayers
from mskip.exporters.contract import Contract

# Folding may compute shapes, never weights: a folded weight is a second copy.
_FOLD_LIMIT = 4096
_AUTO = Dim.DYNAMIC


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
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names[0],
            output_names=names[1],
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_LIMIT, output_size_limit=1 << 16)
    return model


class GraphCache:
    """The model's cache interface over graph inputs: reads past, collects present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]], length: Any) -> None:
        self.past = past
        self.length = length
        self.present: list[tuple[Tensor, Tensor] | None] = [None] * len(past)
        self.is_sliding = [False] * len(past)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions in the past."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Position of the first query."""
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        """Width of the mask, and the position of its first key."""
        return self.length + query_length, 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values."""
        past_key, past_value = self.past[layer_idx]
        present = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.present[layer_idx] = present
        return present


def body_weights(model: PreTrainedModel, sublayers: Sublayers, layer: int) -> dict[str, Tensor]:
    """What a routed layer's body reads, by name, in the order in which it takes it.

    The parameters of the sublayer, then ``compensation.down``, ``.up`` and ``.bias`` where a
    skip is compensated.
    """
    module = family_of(model).sublayer_of(model, layer, sublayers.granularity)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    if sublayers.compensation is not None:
        parts = sublayers.compensation.parts(sublayers.layers.index(layer))
        weights.update({f"compensation.{name}": part.detach() for name, part in parts.items()})
    return weights


@dataclass(frozen=True)
class Body:
    """A routed sublayer's traces.

    Attributes:
        execute: runs the sublayer on chosen rows, and skips the others.
        dense: runs it on all rows, for graphs that always execute.
        skip: what it gives where it is skipped, for all rows; None where that is nothing
            (attention, MLP) or the residual stream itself (block).
    """

    execute: ir.Model
    dense: ir.Model
    skip: ir.Model | None


class _Skip:
    """What a skipped sublayer gives, from the weights of its body."""

    def __init__(self, model: PreTrainedModel, sublayers: Sublayers, layer: int) -> None:
        self.kind = sublayers.granularity
        self.compensated = sublayers.compensation is not None
        family = family_of(model)
        self.norm = family.norm_of(model, layer, self.kind)
        block = family.sublayer_of(model, layer, "block")
        (name,) = [name for name, module in block.named_modules() if module is self.norm]
        self.norm_weights = f"{name}."

    def __call__(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        block = self.kind == "block"
        if not self.compensated:
            return hidden if block else torch.zeros_like(hidden)
        inner = hidden
        if block:
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
    """One sublayer over chosen rows; its weights are arguments."""

    def __init__(
        self, model: PreTrainedModel, sublayers: Sublayers, layer: int, *, rows: bool
    ) -> None:
        super().__init__()
        family = family_of(model)
        # Not registered: a parameter of its own would become an initializer of the trace.
        self.__dict__["sublayer"] = family.sublayer_of(model, layer, sublayers.granularity)
        self.kind = sublayers.granularity
        self.names = list(body_weights(model, sublayers, layer))
        self.layer = layer
        self.rows = rows
        self.skip = _Skip(model, sublayers, layer)

    def forward(
        self,
        rows: Tensor,
        others: Tensor,
        hidden: Tensor,
        place: list[Tensor],
        past: list[Tensor],
        weights: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Execute ``rows``, skip ``others``.

        Args:
            rows: [n] int64, ignored where all rows run.
            others: [batch - n] int64, read where a skip is compensated.
            hidden: input of all rows, [batch, sequence, hidden]; of a block the residual stream.
            place: cos and sin, [batch, sequence, head dim], and the mask, [batch, 1, sequence,
                past + sequence]; nothing for an MLP.
            past: keys and values of ``rows``, [n, kv heads, past, head dim]; likewise.
            weights: see `body_weights`.

        Returns:
            Output of all rows, and the present keys and values of ``rows``.
        """
        named = dict(zip(self.names, weights, strict=True))
        own = {n: value for n, value in named.items() if not n.startswith("compensation.")}
        whole = hidden
        if self.rows:
            hidden, *place = (x.index_select(0, rows) for x in (hidden, *place))
        sublayer, cache = self.__dict__["sublayer"], None
        if self.kind == "mlp":
            output = torch.func.functional_call(sublayer, own, (hidden,))
        else:
            cos, sin, mask = place
            cache = GraphCache([(past[0], past[1])] * (self.layer + 1), past[0].shape[2])
            arguments = {
                "hidden_states": hidden,
                "position_embeddings": (cos, sin),
                "attention_mask": mask,
                "past_key_values": cache,
            }
            output = torch.func.functional_call(sublayer, own, (), arguments)
        if self.kind == "attention":
            output = output[0]
        if self.rows:
            output = self._placed(output, whole, rows, others, named)
        if cache is None:
            return (output,)
        present = cache.present[self.layer]
        assert present is not None
        return (output, *present)

    def _placed(
        self, output: Tensor, whole: Tensor, rows: Tensor, others: Tensor, named: dict[str, Tensor]
    ) -> Tensor:
        base = whole if self.kind == "block" else torch.zeros_like(whole)
        if self.skip.compensated:
            instead = self.skip(whole.index_select(0, others), named)
            base = base.index_copy(0, others, instead)
        return base.index_copy(0, rows, output)


class _SkipBody(nn.Module):
    def __init__(self, model: PreTrainedModel, sublayers: Sublayers, layer: int) -> None:
        super().__init__()
        self.names = list(body_weights(model, sublayers, layer))
        self.skip = _Skip(model, sublayers, layer)

    def forward(self, hidden: Tensor, weights: list[Tensor]) -> Tensor:
        return self.skip(hidden, dict(zip(self.names, weights, strict=True)))


class _ScoreBody(nn.Module):
    def forward(self, hidden: Tensor, prompt_mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(prompt_mean(hidden, prompt_mask) @ weight + bias)


def trace_bodies(
    model: PreTrainedModel, sublayers: Sublayers, contract: Contract
) -> dict[int, Body]:
    """The bodies of the routed layers, by decoder layer; layers of one shape share theirs.

    Args:
        model: a supported causal LM, not patched, on the CPU.
        sublayers: what is routed.
        contract: the routed graph's contract.
    """
    known: dict[Any, Body] = {}
    bodies = {}
    for layer in sublayers.layers:
        key = _shape_of(model, sublayers, layer)
        if key not in known:
            compensated = sublayers.compensation is not None
            known[key] = Body(
                _trace(model, sublayers, layer, contract, rows=True),
                _trace(model, sublayers, layer, contract, rows=False),
                _trace_skip(model, sublayers, layer, contract) if compensated else None,
            )
        bodies[layer] = known[key]
    return bodies


def _shape_of(model: PreTrainedModel, sublayers: Sublayers, layer: int) -> tuple[Any, ...]:
    """What makes two layers' sublayers the same body: class, weights' shapes, kind of layer."""
    sublayer = family_of(model).sublayer_of(model, layer, sublayers.granularity)
    kinds = getattr(model.config, "layer_types", None)
    weights = tuple((name, tuple(p.shape)) for name, p in sublayer.named_parameters())
    return type(sublayer), weights, kinds[layer] if kinds else None


def _trace(
    model: PreTrainedModel, sublayers: Sublayers, layer: int, contract: Contract, *, rows: bool
) -> ir.Model:
    weights = body_weights(model, sublayers, layer)
    batch, positions, past = 3, 5, 7
    chosen = 2 if rows else batch
    dim, heads, dtype = contract.head_dim, contract.kv_heads, model.dtype
    hidden = model.config.get_text_config().hidden_size
    cached = sublayers.granularity != "mlp"
    place, caches = [], []
    if cached:
        place = [
            torch.zeros(batch, positions, dim, dtype=dtype),
            torch.zeros(batch, positions, dim, dtype=dtype),
            torch.zeros(batch, 1, positions, past + positions, dtype=dtype),
        ]
        caches = [torch.zeros(chosen, heads, past, dim, dtype=dtype) for _ in range(2)]
    args = (
        torch.arange(chosen),
        torch.arange(chosen, chosen + 2) % batch,
        torch.zeros(batch, positions, hidden, dtype=dtype),
        place,
        caches,
        list(weights.values()),
    )
    two, kv = {0: _AUTO, 1: _AUTO}, {0: _AUTO, 2: _AUTO}
    shapes = (
        {0: _AUTO}, {0: _AUTO}, two,
        [two, two, {0: _AUTO, 2: _AUTO, 3: _AUTO}] if cached else [],
        [kv, kv] if cached else [],
        [None] * len(weights),
    )  # fmt: skip
    inputs = ["rows", "others", "hidden"]
    inputs += ["cos", "sin", "mask", "past_key", "past_value"] if cached else []
    outputs = ["output", "present_key", "present_value"] if cached else ["output"]
    body = _SublayerBody(model, sublayers, layer, rows=rows)
    return to_ir(body, args, shapes, ([*inputs, *weights], outputs), contract.opset)


def _trace_skip(
    model: PreTrainedModel, sublayers: Sublayers, layer: int, contract: Contract
) -> ir.Model:
    weights = body_weights(model, sublayers, layer)
    hidden = model.config.get_text_config().hidden_size
    args = (torch.zeros(3, 5, hidden, dtype=model.dtype), list(weights.values()))
    shapes = ({0: _AUTO, 1: _AUTO}, [None] * len(weights))
    names = ["hidden", *weights], ["output"]
    return to_ir(_SkipBody(model, sublayers, layer), args, shapes, names, contract.opset)


def trace_score(model: PreTrainedModel, contract: Contract) -> ir.Model:
    """The body of the router's score."""
    hidden = model.config.get_text_config().hidden_size
    args = (
        torch.zeros(3, 5, hidden, dtype=model.dtype),
        torch.ones(3, 5, dtype=torch.int64),
        torch.zeros(hidden),
        torch.zeros(()),
    )
    shapes = ({0: _AUTO, 1: _AUTO}, {0: _AUTO, 1: _AUTO}, None, None)
    names = ["hidden", "prompt_mask", "weight", "bias"]
    return to_ir(_ScoreBody(), args, shapes, (names, ["score"]), contract.opset)
