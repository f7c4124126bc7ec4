"""How the model calls its layers, and these their sublayers: which arguments are tensors.

Masks and rotary tables are handed from layer to layer under names and in structures that
differ between architectures. What is traced is called with the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from mskip.compressor.families import family_of
from mskip.compressor.patching import passing, patched
from mskip.compressor.routing import Call
from mskip.compressor.standins import layers_replaced
from mskip.compressor.sublayers import Sublayers

BATCH, POSITIONS, PAST = 3, 5, 26
"""Sizes in example calls; an axis of one of them, or of their sum, is taken to vary with it."""

_VARYING = {BATCH, POSITIONS, PAST, POSITIONS + PAST}


def tensors_of(arguments: dict[str, Any], cache: str) -> list[Tensor]:
    """The tensors among keyword arguments, in the order of their names' appearance."""
    leaves = pytree.tree_leaves({k: v for k, v in arguments.items() if k != cache})
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Arguments:
    """Keyword arguments of one sublayer's call, without their tensors.

    Attributes:
        cache: name of the KV cache; it is not among the leaves.
        leaves: what is in them, in order, with a mark where a tensor is.
        structure: how the leaves are put together.
        examples: the tensors of an example call.
    """

    cache: str
    leaves: list[Any]
    structure: pytree.TreeSpec
    examples: list[Tensor]

    @classmethod
    def of(cls, arguments: dict[str, Any], cache: str) -> Arguments:
        """Take keyword arguments apart."""
        leaves, structure = pytree.tree_flatten({k: v for k, v in arguments.items() if k != cache})
        holes = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(cache, holes, structure, tensors_of(arguments, cache))

    def filled(self, tensors: list[Tensor], cache: Any) -> dict[str, Any]:
        """The keyword arguments with these tensors and this cache."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _HOLE else leaf for leaf in self.leaves]
        arguments: dict[str, Any] = pytree.tree_unflatten(leaves, self.structure)
        return arguments if cache is None else {**arguments, self.cache: cache}

    def dynamic_axes(self) -> list[dict[int, Any]]:
        """Of every tensor, in the form of `torch.export`."""
        return [
            {axis: Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if size in _VARYING}
            for tensor in self.examples
        ]


_HOLE = object()


def layer_arguments(model: PreTrainedModel, cache: Any) -> dict[int, Arguments]:
    """What the model hands its decoder layers in a call with a past.

    Args:
        model: a supported causal LM on the CPU, with eager attention.
        cache: of `BATCH` sequences with `PAST` positions.
    """
    name = family_of(model).cache
    found: dict[int, Arguments] = {}
    positions = torch.arange(PAST, PAST + POSITIONS).expand(BATCH, -1).contiguous()
    cache.positions = positions

    def note(number: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        found[number] = Arguments.of(arguments, name)
        return hidden

    with layers_replaced(model, note), torch.no_grad():
        model(
            input_ids=torch.zeros(BATCH, POSITIONS, dtype=torch.int64),
            attention_mask=torch.ones(BATCH, cache.width(POSITIONS), dtype=torch.int64),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    return found


def sublayer_arguments(
    model: PreTrainedModel, sublayers: Sublayers, layer: int, given: Arguments, cache: Any
) -> Arguments:
    """What decoder layer ``layer`` hands its routed sublayer, when itself called with ``given``."""
    found: list[Arguments] = []
    family = family_of(model)

    def note(call: Call) -> Tensor:
        found.append(Arguments.of(call.tokens.arguments, family.cache))
        hidden = call.tokens.hidden
        return hidden if sublayers.granularity == "block" else torch.zeros_like(hidden)

    hidden = torch.zeros(
        BATCH, POSITIONS, model.config.get_text_config().hidden_size, dtype=model.dtype
    )
    alone = Sublayers([layer], sublayers.granularity)
    with patched(model, alone), passing(note), torch.no_grad():
        family.decoder_layers(model)[layer](hidden, **given.filled(given.examples, cache))
    return found[0]
