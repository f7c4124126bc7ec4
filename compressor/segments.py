"""Running a causal LM in two parts: below the first routed layer, and from there on.

Routing changes nothing below the first routed layer, so that part runs once,
without gradients, and serves the teacher, the student and every baseline.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.families import Family, family_of
from mskip.compressor.patching import passing, take_rows
from mskip.compressor.routing import Pass
from mskip.compressor.standins import layers_replaced

LayerArguments = dict[int, dict[str, Any]]
"""By decoder layer, what the model hands it beside the hidden state: mask, rotary tables.

Layers of the same kind are handed the same objects."""


@dataclass(frozen=True)
class Stem:
    """The residual stream where the first routed layer begins.

    Attributes:
        hidden: [batch, sequence, hidden], no gradient.
        arguments: of every layer from there on.
    """

    hidden: Tensor
    arguments: LayerArguments

    def rows(self, rows: list[int]) -> Stem:
        """The stem of some of the sequences; what layers share is taken once and stays shared."""
        index = torch.tensor(rows, device=self.hidden.device)
        batch = self.hidden.shape[0]
        taken: dict[int, Any] = {}  # by the identity of what is taken, which this stem keeps alive

        def some(value: Any) -> Any:
            if id(value) not in taken:
                taken[id(value)] = take_rows(value, index, batch)
            return taken[id(value)]

        arguments = {
            number: {key: some(value) for key, value in given.items()}
            for number, given in self.arguments.items()
        }
        return Stem(self.hidden.index_select(0, index), arguments)


class _StemReached(Exception):
    pass


class SplitModel:
    """A supported causal LM with a cut before decoder layer ``first``.

    Args:
        model: the model.
        first: the first decoder layer of the upper part.

    Attributes:
        upper: number and module of every decoder layer of the upper part, in order.

    Raises:
        ModelError: unsupported architecture.
    """

    def __init__(self, model: PreTrainedModel, first: int) -> None:
        self.model = model
        self.family: Family = family_of(model)
        self._layers = list(enumerate(self.family.decoder_layers(model)))
        self.upper = self._layers[first:]
        self._norm = model.get_submodule(self.family.final_norm)

    @torch.no_grad()
    def stem(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Stem:
        """Run embedding and lower layers; all arguments are [batch, sequence] int64."""
        return self._record(self.upper, input_ids, attention_mask, position_ids)

    @torch.no_grad()
    def layer_arguments(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> LayerArguments:
        """What the model hands the layers of the upper part, without running a layer."""
        every = self._record(self._layers, input_ids, attention_mask, position_ids).arguments
        return {number: every[number] for number, _ in self.upper}

    def _record(
        self,
        recorded: list[tuple[int, nn.Module]],
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
    ) -> Stem:
        """Run the model up to ``recorded``; those layers only note what they are given."""
        hidden: list[Tensor] = []
        arguments: LayerArguments = {}

        def note(number: int, given: Tensor, kwargs: dict[str, Any]) -> Tensor:
            hidden.append(given)
            arguments[number] = kwargs
            if number == recorded[-1][0]:
                raise _StemReached
            return given

        numbers = [number for number, _ in recorded]
        with layers_replaced(self.model, note, numbers), suppress(_StemReached):
            self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )
        return Stem(hidden[0], arguments)

    def finish(
        self, stem: Stem, routing: Pass | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """Run the upper layers and the final norm, [batch, sequence, hidden].

        Args:
            stem: from `stem`.
            routing: the pass of the routed sublayers (the model must be
                patched); None runs them all.
            checkpoint: keep the layers' inputs alone for the backward pass and compute the
                rest again; ``routing`` must then give the same twice.
        """
        hidden = stem.hidden
        for number, layer in self.upper:
            run = partial(self.run, layer, stem.arguments[number], routing)
            hidden = (
                torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=False)
                if checkpoint
                else run(hidden)
            )
        normed: Tensor = self._norm(hidden)
        return normed

    def run(
        self, layer: nn.Module, arguments: dict[str, Any], routing: Pass | None, hidden: Tensor
    ) -> Tensor:
        """The residual stream after a layer of the upper part, under a pass."""
        with passing(routing):
            return self.family.hidden_of(layer(hidden, **arguments))

    def cut_at(self, layer: int) -> SplitModel:
        """The same model cut before decoder layer ``layer``, which is in the upper part."""
        other = copy.copy(self)
        other.upper = [(number, module) for number, module in self.upper if number >= layer]
        return other

    def advance(self, stem: Stem, layer: int, routing: Pass) -> Stem:
        """The stem of `cut_at` ``layer``: the residual stream there under this pass."""
        hidden = stem.hidden
        for number, module in self.upper:
            if number == layer:
                break
            hidden = self.run(module, stem.arguments[number], routing, hidden)
        return Stem(hidden, stem.arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits from final hidden states, [..., hidden] -> [..., vocabulary]."""
        return self.family.logits_of(self.model, hidden)
