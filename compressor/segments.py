"""Running a causal LM in two parts: below the first routed layer, and from there on.

Routing changes nothing below the first routed layer, so that part runs once,
without gradients, and serves the teacher, the student and every baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.families import Family, family_of
from mskip.compressor.routing import Pass
from mskip.compressor.skipping import take_rows


@dataclass(frozen=True)
class Stem:
    """The residual stream where the first routed layer begins.

    Attributes:
        hidden: [batch, sequence, hidden], no gradient.
        arguments: what the model hands every decoder layer (mask, rotary embeddings).
    """

    hidden: Tensor
    arguments: dict[str, Any]

    def rows(self, rows: list[int]) -> Stem:
        """The stem of some of the sequences."""
        index = torch.tensor(rows, device=self.hidden.device)
        batch = self.hidden.shape[0]
        arguments = {k: take_rows(v, index, batch) for k, v in self.arguments.items()}
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
        layers = self.family.decoder_layers(model)
        self._first_layer = layers[first]
        self._lowest_layer = layers[0]
        self.upper = list(enumerate(layers))[first:]
        self._norm = model.get_submodule(self.family.final_norm)
        self._head = model.get_submodule(self.family.head)

    @torch.no_grad()
    def stem(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Stem:
        """Run embedding and lower layers; all arguments are [batch, sequence] int64."""
        return self._until(self._first_layer, input_ids, attention_mask, position_ids)

    @torch.no_grad()
    def layer_arguments(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> dict[str, Any]:
        """What the model hands every decoder layer, without running one."""
        return self._until(self._lowest_layer, input_ids, attention_mask, position_ids).arguments

    def _until(
        self, layer: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Stem:
        found: dict[str, Any] = {}

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found["hidden"] = args[0] if args else kwargs.pop("hidden_states")
            # An attached model's own pass is not ours: `finish` is given one, or runs dense.
            found["arguments"] = {k: v for k, v in kwargs.items() if k != "routing"}
            raise _StemReached

        hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )
        except _StemReached:
            pass
        finally:
            hook.remove()
        return Stem(found["hidden"], found["arguments"])

    def finish(self, stem: Stem, routing: Pass | None = None) -> Tensor:
        """Run the upper layers and the final norm, [batch, sequence, hidden].

        Args:
            stem: from `stem`.
            routing: the pass of the routed sublayers (the model must be
                patched); None runs them all.
        """
        hidden = stem.hidden
        arguments = stem.arguments if routing is None else {**stem.arguments, "routing": routing}
        for _, layer in self.upper:
            hidden = layer(hidden, **arguments)
        normed: Tensor = self._norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Head over final hidden states, [..., hidden] -> [..., vocabulary]."""
        output: Tensor = self._head(hidden)
        return output
