"""Another attention in the place of a model's own, by transformers' attention interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from mskip.compressor.errors import ModelError


def require_choice(model: PreTrainedModel, consequence: str, remedy: str) -> None:
    """Refuse an architecture that does not let its attention be chosen.

    Args:
        model: of the architecture.
        consequence: what it therefore lacks, such as "it has no fused form".
        remedy: what to do instead.

    Raises:
        ModelError: it has its attention written into its modelling file.
    """
    if not type(model)._can_set_attn_implementation():
        raise ModelError(
            f"{type(model).__name__} has its attention written into its modelling file, so "
            f"{consequence}.",
            remedy,
        )


@contextlib.contextmanager
def attention_as(
    model: PreTrainedModel, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """The model's attention is another function for the duration of the block.

    Args:
        model: see `require_choice`.
        name: under which transformers is to know the functions.
        attention: what runs in the attention's place.
        mask: what it is handed as a mask.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
