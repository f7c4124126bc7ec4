"""From transformers' own modules to ONNX parts, once each.

The model is traced whole with every routed sublayer replaced by a placeholder
node (the *trunk*); the sublayer of a routed layer is traced by itself, with its
weights as inputs (a *body*), and serves every layer of the same shape. The
router's score is a body too. Lowering puts the parts together: the same trace
gives the routed, the dense and the static graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from mskip.compressor.families import family_of
from mskip.compressor.router import Routers
from mskip.compressor.routing import UNDECIDED, Call
from mskip.compressor.skipping import patched
from mskip.exporters.bodies import Body, GraphCache, to_ir, trace_bodies, trace_score
from mskip.exporters.contract import Contract

DOMAIN = "mskip"
SUBLAYER = "RoutedSublayer"
SCORE = "RouterScore"


@dataclass
class Traced:
    """Parts of the graph.

    Attributes:
        trunk: the whole model with placeholders; initializers share the model's memory.
        bodies: what runs at a placeholder, by the decoder layer.
        score: body of the router's score.
        contract: names and axes.
    """

    trunk: ir.Model
    bodies: dict[int, Body]
    score: ir.Model
    contract: Contract


class _TracedPass:
    """The pass of the trunk: scores, decides, and leaves a placeholder for the sublayer."""

    def __init__(
        self, trunk: _Trunk, routing: Tensor, tau: Tensor, prompt_mask: Tensor, cache: GraphCache
    ) -> None:
        self.trunk = trunk
        self.routing, self.tau = routing, tau
        self.prompt_mask = prompt_mask
        self.cache = cache
        self.undecided = (routing == UNDECIDED).any()
        self.gates: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.arguments: dict[int, dict[str, Any]] = {}

    def watch(self, layer: int, module: nn.Module) -> Any:
        """Note what the model hands decoder layer ``layer``; returns the hook."""

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            named = {"hidden_states": args[0]} if args else {}
            self.arguments[layer] = {**named, **kwargs}

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def __call__(self, call: Call) -> Tensor:
        index, hidden = call.index, call.hidden
        score = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{SCORE}",
            (self.undecided, hidden, self.prompt_mask, self.trunk.weight[index],
             self.trunk.bias[index]),
            {},
            dtype=torch.float32,
            shape=(hidden.shape[0],),
            version=1,
        )  # fmt: skip
        routing = self.routing[:, index]
        taken = score >= self.tau[index]
        # Not `where`: ONNX Runtime has none for booleans.
        gate = ((routing == UNDECIDED) & taken) | (routing > 0)
        self.scores.append(score)
        self.gates.append(gate)
        return self._placeholder(gate, hidden, self.trunk.layers[index])

    def _placeholder(self, gate: Tensor, hidden: Tensor, layer: int) -> Tensor:
        name = f"{DOMAIN}::{SUBLAYER}"
        attributes: Any = {"layer": layer}
        if self.trunk.granularity == "mlp":
            return torch.onnx.ops.symbolic(
                name, (gate, hidden), attributes, dtype=hidden.dtype, shape=hidden.shape, version=1
            )
        arguments = self.arguments[layer]
        if self.trunk.granularity == "block":
            hidden = arguments["hidden_states"]
        batch = hidden.shape[0]
        cos, sin = arguments["position_embeddings"]
        past_key, past_value = self.cache.past[layer]
        heads, dim = past_key.shape[1], past_key.shape[3]
        present = (past_key.shape[0], heads, self.cache.length + hidden.shape[1], dim)
        output, key, value = torch.onnx.ops.symbolic_multi_out(
            name,
            (gate, hidden, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1),
             arguments["attention_mask"], past_key, past_value),
            attributes,
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
        self.granularity = routers.sublayers.granularity
        self.compact = routers.sublayers.cached
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
        # A layer whose cache has a row for every sequence: its length is the model's.
        whole = next(i for i in range(len(past)) if i not in self.compact)
        cache = GraphCache(past, past[whole][0].shape[2])
        prompt_mask = attention_mask[:, -positions:]
        hard = _TracedPass(self, routing, tau, prompt_mask, cache)
        blocks = family_of(self.model).decoder_layers(self.model)
        hooks = [hard.watch(layer, blocks[layer]) for layer in self.layers]
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
            for hook in hooks:
                hook.remove()
        decided = torch.stack(hard.gates, dim=1).to(torch.int64)
        return logits, decided, torch.stack(hard.scores, dim=1), cache.present


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


def trace(model: PreTrainedModel, routers: Routers, contract: Contract) -> Traced:
    """Trace the parts.

    Args:
        model: a supported causal LM, float32, on the CPU.
        routers: its routers.
        contract: the routed graph's contract.
    """
    auto = Dim.DYNAMIC
    batch, positions, past = 3, 5, 7
    heads, dim = contract.kv_heads, contract.head_dim
    routed = len(routers.layers)
    dtype = model.dtype
    with _eager_attention(model):
        caches = []
        for layer in range(contract.layers):
            rows = 2 if layer in routers.sublayers.cached else batch
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
        with patched(model, routers.sublayers):
            trunk = to_ir(_Trunk(model, routers), args, shapes, names, contract.opset)
        bodies = trace_bodies(model, routers.sublayers, contract)
    return Traced(trunk, bodies, trace_score(model, contract), contract)
