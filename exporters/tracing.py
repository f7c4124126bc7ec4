"""From transformers' own modules to ONNX parts, once each.

The model is traced whole with every routed attention replaced by a placeholder
node (the *trunk*); the attention of a routed layer is traced by itself, with its
weights as inputs (a *body*), and serves every layer of the same shape. The
router's score is a body too. Lowering puts the parts together: the same trace
gives the routed, the dense and the static graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from mskip.compressor.families import Family, family_of
from mskip.compressor.router import Routers, prompt_mean
from mskip.compressor.routing import UNDECIDED, Call
from mskip.compressor.skipping import patched
from mskip.exporters.contract import Contract

DOMAIN = "mskip"
ATTENTION = "RoutedAttention"
SCORE = "RouterScore"

# Folding may compute shapes, never weights: a folded weight is a second copy.
_FOLD_LIMIT = 4096


@dataclass
class Traced:
    """Parts of the graph.

    Attributes:
        trunk: the whole model with placeholders; initializers share the model's memory.
        attention: bodies by the decoder layer that uses them.
        dense_attention: the same without row selection, for graphs that always execute.
        score: body of the router's score.
        contract: names and axes.
    """

    trunk: ir.Model
    attention: dict[int, ir.Model]
    dense_attention: dict[int, ir.Model]
    score: ir.Model
    contract: Contract


class _GraphCache:
    """The model's cache interface over graph inputs: reads past, collects present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]], length: Any) -> None:
        self.past = past
        self.length = length
        self.present: list[tuple[Tensor, Tensor] | None] = [None] * len(past)
        self.is_sliding = [False] * len(past)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return self.length + query_length, 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past_key, past_value = self.past[layer_idx]
        present = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.present[layer_idx] = present
        return present


class _TracedPass:
    """The pass of the trunk: scores, decides, and leaves a placeholder for the sublayer."""

    def __init__(
        self, trunk: _Trunk, routing: Tensor, tau: Tensor, prompt_mask: Tensor, cache: _GraphCache
    ) -> None:
        self.trunk = trunk
        self.routing, self.tau = routing, tau
        self.prompt_mask = prompt_mask
        self.cache = cache
        self.undecided = (routing == UNDECIDED).any()
        self.gates: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.arguments: dict[str, Any] = {}

    def __call__(self, call: Call) -> Tensor:
        index, hidden = call.index, call.hidden
        layer = self.trunk.layers[index]
        batch = hidden.shape[0]
        score = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{SCORE}",
            (self.undecided, hidden, self.prompt_mask, self.trunk.weight[index],
             self.trunk.bias[index]),
            {},
            dtype=torch.float32,
            shape=(batch,),
            version=1,
        )  # fmt: skip
        routing = self.routing[:, index]
        taken = score >= self.tau[index]
        # Not `where`: ONNX Runtime has none for booleans.
        gate = ((routing == UNDECIDED) & taken) | (routing > 0)
        self.scores.append(score)
        self.gates.append(gate)
        cos, sin = self.arguments["position_embeddings"]
        past_key, past_value = self.cache.past[layer]
        heads, dim = past_key.shape[1], past_key.shape[3]
        present = (past_key.shape[0], heads, self.cache.length + hidden.shape[1], dim)
        output, key, value = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{ATTENTION}",
            (gate, hidden, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1),
             self.arguments["attention_mask"], past_key, past_value),
            {"layer": layer},
            dtypes=(hidden.dtype, past_key.dtype, past_value.dtype),
            shapes=(hidden.shape, present, present),
            version=1,
        )  # fmt: skip
        self.cache.present[layer] = (key, value)
        return output


class _Trunk(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, model: PreTrainedModel, routers: Routers) -> None:
        super().__init__()
        self.model = model
        self.layers = routers.layers
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
        past: list[tuple[Tensor, Tensor]],
    ) -> Any:
        positions = input_ids.shape[1]
        dense = next(i for i in range(len(past)) if i not in self.layers)
        cache = _GraphCache(past, past[dense][0].shape[2])
        prompt_mask = attention_mask[:, -positions:]
        hard = _TracedPass(self, routing, tau, prompt_mask, cache)
        family = family_of(self.model)
        first = family.decoder_layers(self.model)[self.layers[0]] if self.layers else None

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hard.arguments.update(kwargs)

        hook = first.register_forward_pre_hook(note, with_kwargs=True) if first else None
        try:
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                routing=hard,
            ).logits
        finally:
            if hook:
                hook.remove()
        decided = torch.stack(hard.gates, dim=1).to(torch.int64)
        return logits, decided, torch.stack(hard.scores, dim=1), cache.present


class _AttentionBody(nn.Module):
    """One attention module over chosen rows; its weights are arguments."""

    def __init__(self, attention: nn.Module, names: list[str], layer: int, *, rows: bool) -> None:
        super().__init__()
        self.__dict__["attention"] = attention
        self.names = names
        self.layer = layer
        self.rows = rows

    def _attend(self, weights: list[Tensor], cache: _GraphCache, **arguments: Any) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        output: Tensor = torch.func.functional_call(
            self.__dict__["attention"], named, kwargs={**arguments, "past_key_values": cache}
        )[0]
        return output

    def forward(
        self,
        rows: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs = [(past_key, past_value)] * (self.layer + 1)
        cache = _GraphCache(pairs, past_key.shape[2])
        whole = hidden
        if self.rows:
            hidden, cos, sin, mask = (x.index_select(0, rows) for x in (hidden, cos, sin, mask))
        output = self._attend(
            weights,
            cache,
            hidden_states=hidden,
            position_embeddings=(cos, sin),
            attention_mask=mask,
        )
        present = cache.present[self.layer]
        assert present is not None
        if self.rows:
            output = torch.zeros_like(whole).index_copy(0, rows, output)
        return output, *present


class _ScoreBody(nn.Module):
    def forward(self, hidden: Tensor, prompt_mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(prompt_mean(hidden, prompt_mask) @ weight + bias)


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    # The decomposed form: a mask of finite numbers, so a fully padded query row
    # gives garbage that nobody reads, where -inf would give NaN that spreads.
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _export(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, names: tuple[list[str], list[str]],
    opset: int,
) -> ir.Model:  # fmt: skip
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


def trace(model: PreTrainedModel, routers: Routers, contract: Contract) -> Traced:
    """Trace the parts.

    Args:
        model: a supported causal LM, float32, on the CPU.
        routers: its routers.
        contract: the routed graph's contract.
    """
    family = family_of(model)
    auto = Dim.DYNAMIC
    batch, positions, past = 3, 5, 7
    heads, dim = contract.kv_heads, contract.head_dim
    routed = len(routers.layers)
    dtype = model.dtype
    with _eager_attention(model):
        caches = []
        for layer in range(contract.layers):
            rows = 2 if layer in routers.layers else batch
            shape = rows, heads, past, dim
            # Two tensors: the exporter takes one object given twice for one input.
            caches.append((torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)))
        args = (
            torch.zeros(batch, positions, dtype=torch.int64),
            torch.ones(batch, past + positions, dtype=torch.int64),
            torch.arange(past, past + positions).expand(batch, -1).contiguous(),
            torch.ones(batch, routed, dtype=torch.int64),
            torch.full((routed,), 0.5),
            caches,
        )
        kv = {0: auto, 2: auto}
        two = {0: auto, 1: auto}
        shapes = (two, two, two, {0: auto}, None, [(kv, kv) for _ in caches])
        names = (
            [spec.name for spec in contract.inputs()],
            [spec.name for spec in contract.outputs()],
        )
        with patched(model, routers.layers):
            trunk = _export(_Trunk(model, routers), args, shapes, names, contract.opset)
        bodies: dict[Any, ir.Model] = {}
        dense_bodies: dict[Any, ir.Model] = {}
        attention, dense_attention = {}, {}
        for layer in routers.layers:
            key = _shape_of(family, model, layer)
            if key not in bodies:
                bodies[key] = _trace_attention(family, model, layer, contract, rows=True)
                dense_bodies[key] = _trace_attention(family, model, layer, contract, rows=False)
            attention[layer], dense_attention[layer] = bodies[key], dense_bodies[key]
    return Traced(trunk, attention, dense_attention, _trace_score(model, contract), contract)


def _shape_of(family: Family, model: PreTrainedModel, layer: int) -> tuple[Any, ...]:
    """What makes two layers' attention the same body: class, weights' shapes, kind of layer."""
    attention = family.attention_of(model, layer)
    kinds = getattr(model.config, "layer_types", None)
    weights = tuple((name, tuple(p.shape)) for name, p in attention.named_parameters())
    return type(attention), weights, kinds[layer] if kinds else None


def weight_names(family: Family, model: PreTrainedModel, layer: int) -> list[str]:
    """Parameter names of a layer's attention, in the order in which bodies take them."""
    return [name for name, _ in family.attention_of(model, layer).named_parameters()]


def _trace_attention(
    family: Family, model: PreTrainedModel, layer: int, contract: Contract, *, rows: bool
) -> ir.Model:
    attention = family.attention_of(model, layer)
    names = weight_names(family, model, layer)
    batch, positions, past = 3, 5, 7
    chosen = 2 if rows else batch
    dim, heads, dtype = contract.head_dim, contract.kv_heads, model.dtype
    hidden = model.config.get_text_config().hidden_size
    cache = torch.zeros(chosen, heads, past, dim, dtype=dtype)
    auto = Dim.DYNAMIC
    args = (
        torch.arange(chosen),
        torch.zeros(batch, positions, hidden, dtype=dtype),
        torch.zeros(batch, positions, dim, dtype=dtype),
        torch.zeros(batch, positions, dim, dtype=dtype),
        torch.zeros(batch, 1, positions, past + positions, dtype=dtype),
        cache,
        cache.clone(),
        list(attention.parameters()),
    )
    two, kv = {0: auto, 1: auto}, {0: auto, 2: auto}
    shapes = ({0: auto}, two, two, two, {0: auto, 2: auto, 3: auto}, kv, kv, [None] * len(names))
    inputs = ["rows", "hidden", "cos", "sin", "mask", "past_key", "past_value", *names]
    outputs = ["output", "present_key", "present_value"]
    body = _AttentionBody(attention, names, attention.layer_idx, rows=rows)  # type: ignore[arg-type]
    return _export(body, args, shapes, (inputs, outputs), contract.opset)


def _trace_score(model: PreTrainedModel, contract: Contract) -> ir.Model:
    auto = Dim.DYNAMIC
    hidden = model.config.get_text_config().hidden_size
    args = (
        torch.zeros(3, 5, hidden, dtype=model.dtype),
        torch.ones(3, 5, dtype=torch.int64),
        torch.zeros(hidden),
        torch.zeros(()),
    )
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, None, None)
    names = ["hidden", "prompt_mask", "weight", "bias"]
    return _export(_ScoreBody(), args, shapes, (names, ["score"]), contract.opset)
