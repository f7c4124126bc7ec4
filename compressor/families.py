"""Architectures, one row each.

A row names the places in a Hugging Face model that routing needs. "Skip" must
mean "the residual stream is unchanged by this sublayer", so a row is only
right for an architecture whose layer adds the sublayer's output to the
residual stream as it comes (or through a map that sends zero to zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.sublayers import Granularity


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what routing touches.

    Attributes:
        model_type: ``config.model_type`` of the architecture.
        layers: path of the decoder layers' ``ModuleList``.
        attention: name of the attention module within a layer; its first
            argument ``hidden_states`` is the post-layernorm hidden state.
        attention_norm: name of the norm before the attention, which is the layer's first step.
        mlp: name of the MLP within a layer; it takes the normed hidden state alone.
        mlp_norm: name of the norm before the MLP.
        final_norm: path of the norm before the head.
        head: path of the language-model head.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def decoder_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers of ``model``, in order."""
        return list(cast(nn.ModuleList, model.get_submodule(self.layers)))

    def attention_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The attention module of decoder layer ``layer``."""
        return model.get_submodule(f"{self.layers}.{layer}.{self.attention}")

    def sublayer_of(self, model: PreTrainedModel, layer: int, kind: Granularity) -> nn.Module:
        """The module that a skip of this granularity leaves out."""
        block = model.get_submodule(f"{self.layers}.{layer}")
        if kind == "block":
            return block
        return block.get_submodule(self.attention if kind == "attention" else self.mlp)

    def norm_of(self, model: PreTrainedModel, layer: int, kind: Granularity) -> nn.Module:
        """The norm that gives the sublayer's input; its own input is the residual stream."""
        name = self.mlp_norm if kind == "mlp" else self.attention_norm
        return model.get_submodule(f"{self.layers}.{layer}.{name}")


FAMILIES: dict[str, Family] = {row.model_type: row for row in (Family("llama"),)}


def family_of(model: PreTrainedModel) -> Family:
    """The row of ``model``'s architecture.

    Raises:
        ModelError: the architecture has no row, or uses sliding-window layers,
            which no row supports yet.
    """
    model_type = model.config.model_type
    try:
        family = FAMILIES[model_type]
    except KeyError:
        raise ModelError(
            f"architecture '{model_type}' is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}.",
            "Support is one row in compressor/families.py; see CONTRIBUTING.md.",
        ) from None
    layer_types = getattr(model.config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        raise ModelError(
            f"this '{model_type}' model has layers other than full attention "
            f"({', '.join(sorted(set(layer_types)))}), which its row does not support.",
        )
    return family
