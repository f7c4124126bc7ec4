"""Modules that take the places of decoder layers, to see what the model hands these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.families import Family, family_of
from mskip.compressor.patching import by_name

Called = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""Given a layer's number, hidden state and other arguments by name, returns its hidden state."""


class StandIn(nn.Module):
    """Takes the place of a decoder layer, whose hooks therefore see nothing of it.

    Args:
        number: of the layer.
        family: of the model.
        layer: the layer.
        called: is handed what the layer would be.
    """

    def __init__(self, number: int, family: Family, layer: nn.Module, called: Called) -> None:
        super().__init__()
        self.number = number
        self.family = family
        self.called = called
        self.__dict__["layer"] = layer  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # models may ask a layer for its kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``called``."""
        named = dict(by_name(self.__dict__["layer"].forward, args, kwargs))
        hidden = self.called(self.number, named.pop("hidden_states"), named)
        return (hidden, None) if self.family.layer_gives_tuple else hidden


@contextmanager
def layers_replaced(
    model: PreTrainedModel, called: Called, numbers: Iterable[int] | None = None
) -> Iterator[None]:
    """Decoder layers are `StandIn`s for the duration of the block.

    Args:
        model: a supported causal LM.
        called: see `StandIn`.
        numbers: which layers; None replaces all.
    """
    family = family_of(model)
    layers = family.decoder_layers(model)
    container = model.get_submodule(family.layers)
    saved = dict(container._modules)
    for number in range(len(layers)) if numbers is None else numbers:
        stand_in = StandIn(number, family, layers[number], called)
        container._modules[str(number)] = stand_in
    try:
        yield
    finally:
        container._modules.update(saved)
