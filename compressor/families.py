"""Architectures, one row each.

A row names the places in a Hugging Face model that routing needs. "Skip" must
mean "the residual stream is unchanged by this sublayer", so a row is only
right for an architecture whose layer adds the sublayer's output to the
residual stream, as it comes or through a norm that the row names. Such a norm
belongs to the sublayer: what is executed, skipped or compensated is what
reaches the residual stream. (A compensation sent through the norm would come
out at full size however small it is, and a relaxed gate before it would have
no gradient: the norm undoes any scale.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.sublayers import Granularity

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what routing touches.

    Attributes:
        model_type: ``config.model_type`` of the architecture.
        layers: path of the decoder layers' ``ModuleList``.
        attention: name of the attention module within a layer; its first
            argument ``hidden_states`` is the post-layernorm hidden state.
        attention_norm: name of the norm before the attention, which is the layer's first step.
        attention_post_norm: name of the norm between the attention and the residual stream;
            None where there is none.
        mlp: name of the MLP within a layer; it takes the normed hidden state alone.
        mlp_norm: name of the norm before the MLP.
        mlp_post_norm: name of the norm between the MLP and the residual stream.
        final_norm: path of the norm before the head.
        head: path of the language-model head.
        logit_cap: configuration entry c by which logits become ``c * tanh(logits / c)``.
        layer_types: kinds of attention layer for which the row is right.
        off: configuration entries that must be unset or false.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    logit_cap: str | None = None
    layer_types: frozenset[str] = frozenset({FULL})
    off: tuple[str, ...] = ()

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

    def post_norm_of(
        self, model: PreTrainedModel, layer: int, kind: Granularity
    ) -> nn.Module | None:
        """The norm that the sublayer's output goes through; None where it is added as it comes."""
        names = {"attention": self.attention_post_norm, "mlp": self.mlp_post_norm}
        name = names.get(kind)
        return None if name is None else model.get_submodule(f"{self.layers}.{layer}.{name}")

    def logit_cap_of(self, model: PreTrainedModel) -> float | None:
        """The bound c of ``c * tanh(logits / c)``; None where logits are the head's output."""
        return None if self.logit_cap is None else getattr(model.config, self.logit_cap, None)


_EITHER = frozenset({FULL, SLIDING})

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral", layer_types=_EITHER),
        Family("qwen2", layer_types=_EITHER),
        # Norms before and after each sublayer; what Llama calls the norm before the MLP is
        # here the norm after the attention. With bidirectional attention the answer would
        # reach the prompt's hidden states, from which decisions are taken.
        Family(
            "gemma3_text",
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            logit_cap="final_logit_softcapping",
            layer_types=_EITHER,
            off=("use_bidirectional_attention",),
        ),
    )
}


def layer_types_of(config: Any) -> frozenset[str]:
    """The kinds of attention layer in a model, by its configuration.

    Args:
        config: as loaded, or the bare entries of a ``config.json``.
    """
    if kinds := getattr(config, "layer_types", None):
        return frozenset(kinds)
    # As transformers' own caches infer it. Qwen2's files state a window that is not in use.
    window = getattr(config, "sliding_window", None)
    slides = window is not None and getattr(config, "use_sliding_window", True)
    return frozenset({SLIDING if slides else FULL})


def family_of(model: PreTrainedModel) -> Family:
    """The row of ``model``'s architecture; reads nothing but ``model.config``.

    Raises:
        ModelError: the architecture has no row, or the model has layers or
            switches for which its row is not right.
    """
    config = model.config
    model_type = config.model_type
    try:
        family = FAMILIES[model_type]
    except KeyError:
        raise ModelError(
            f"architecture '{model_type}' is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}.",
            "Support is one row in compressor/families.py; see CONTRIBUTING.md.",
        ) from None
    if unknown := layer_types_of(config) - family.layer_types:
        supported = " and ".join(sorted(family.layer_types)).replace("_", " ")
        raise ModelError(
            f"this '{model_type}' model has layers other than {supported} "
            f"({', '.join(sorted(unknown))}), which its row does not support.",
        )
    if on := [name for name in family.off if getattr(config, name, None)]:
        raise ModelError(
            f"this '{model_type}' model is configured with {', '.join(on)}, which its row does "
            "not support."
        )
    return family
