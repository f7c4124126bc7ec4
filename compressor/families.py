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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.sublayers import Granularity

FULL, SLIDING = "full_attention", "sliding_attention"

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what routing touches.

    Where a name is a tuple, the first one that a layer has is meant: some architectures name
    their parts differently from one configuration to another.

    Attributes:
        model_type: ``config.model_type`` of the architecture.
        layers: path of the decoder layers' ``ModuleList``.
        attention: name of the attention module within a layer; its first
            argument ``hidden_states`` is the post-layernorm hidden state.
        attention_norm: name of the norm before the attention; None where the attention is
            given the residual stream itself.
        attention_post_norm: name of the norm between the attention and the residual stream;
            None where there is none.
        mlp: name of the MLP within a layer; it takes the normed hidden state alone. Where
            "mlp" is not offered it is the module that gives what the MLP adds.
        mlp_norm: name of the norm before the MLP; None as above.
        mlp_post_norm: name of the norm between the MLP and the residual stream.
        cache: name by which layers and attention are handed the KV cache.
        layer_gives_tuple: a layer returns ``(hidden, ...)`` rather than the hidden state.
        final_norm: path of the norm before the head.
        head: path of the language-model head.
        logit_cap: configuration entry c by which logits become ``c * tanh(logits / c)``.
        logit_factor: configuration entry by which the head's output is multiplied.
        logit_divisor: configuration entry by which the head's output is divided.
        residual_factor: configuration entry by which a sublayer's output is multiplied
            before it is added to the residual stream.
        layer_types: kinds of attention layer for which the row is right.
        granularities: what may be routed.
        on: configuration entries that must be set and true.
        off: configuration entries that must be unset or false.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: Names | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp: str = "mlp"
    mlp_norm: Names | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    cache: str = "past_key_values"
    layer_gives_tuple: bool = False
    final_norm: str = "model.norm"
    head: str = "lm_head"
    logit_cap: str | None = None
    logit_factor: str | None = None
    logit_divisor: str | None = None
    residual_factor: str | None = None
    layer_types: frozenset[str] = frozenset({FULL})
    granularities: frozenset[Granularity] = frozenset({"attention", "mlp", "block"})
    on: tuple[str, ...] = ()
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

    def norm_of(self, model: PreTrainedModel, layer: int, kind: Granularity) -> nn.Module | None:
        """The norm that gives the sublayer's input; its own input is the residual stream.

        None where the residual stream is the sublayer's input. Of a block it is the norm
        before its attention.
        """
        names = self.mlp_norm if kind == "mlp" else self.attention_norm
        return None if names is None else _first(self.sublayer_of(model, layer, "block"), names)

    def post_norm_of(
        self, model: PreTrainedModel, layer: int, kind: Granularity
    ) -> nn.Module | None:
        """The norm that the sublayer's output goes through; None where it is added as it comes."""
        names = {"attention": self.attention_post_norm, "mlp": self.mlp_post_norm}
        name = names.get(kind)
        return None if name is None else model.get_submodule(f"{self.layers}.{layer}.{name}")

    def hidden_of(self, output: Any) -> Tensor:
        """The hidden state in what a layer returned."""
        hidden: Tensor = output[0] if self.layer_gives_tuple else output
        return hidden

    def residual_factor_of(self, model: PreTrainedModel) -> float:
        """What a sublayer's output is multiplied by before it joins the residual stream."""
        name = self.residual_factor
        return 1.0 if name is None else float(getattr(model.config, name))

    def logits_of(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """The model's logits from final hidden states, [..., hidden] -> [..., vocabulary]."""
        config = model.config
        logits: Tensor = model.get_submodule(self.head)(hidden)
        if self.logit_factor is not None:
            logits = logits * getattr(config, self.logit_factor)
        if self.logit_divisor is not None:
            logits = logits / getattr(config, self.logit_divisor)
        cap = self._cap_of(model)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def has_affine_head(self, model: PreTrainedModel) -> bool:
        """Whether logits are a matrix times the final hidden state, plus a constant."""
        return self._cap_of(model) is None

    def _cap_of(self, model: PreTrainedModel) -> float | None:
        return None if self.logit_cap is None else getattr(model.config, self.logit_cap, None)


def _first(block: nn.Module, names: Names) -> nn.Module:
    every = (names,) if isinstance(names, str) else names
    found = next((m for m in (getattr(block, name, None) for name in every) if m is not None), None)
    if found is None:
        raise ModelError(f"a {type(block).__name__} has none of: {', '.join(every)}.")
    return cast(nn.Module, found)


_EITHER = frozenset({FULL, SLIDING})

_ATTENTION_ONLY: frozenset[Granularity] = frozenset({"attention"})

# Norms before and after each sublayer; what Llama calls the norm before the MLP is here the
# norm after the attention.
_SANDWICH: dict[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "logit_cap": "final_logit_softcapping",
    "layer_types": _EITHER,
    # With bidirectional attention the answer would reach the prompt's hidden states, from
    # which decisions are taken.
    "off": ("use_bidirectional_attention",),
}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral", layer_types=_EITHER),
        Family("qwen2", layer_types=_EITHER),
        Family("qwen3", layer_types=_EITHER),
        Family("smollm3", layer_types=_EITHER),
        Family("phi3", layer_types=_EITHER),
        Family("granite", residual_factor="residual_multiplier", logit_divisor="logits_scaling"),
        Family("gemma2", **_SANDWICH),
        Family("gemma3_text", **_SANDWICH),
        # Norms after the sublayers only: these are given the residual stream itself.
        Family(
            "olmo2",
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
        # Attention and MLP in parallel by `use_parallel_residual`: both are added to the stream.
        Family("stablelm", mlp_norm=("post_attention_layernorm", "input_layernorm")),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            cache="layer_past",
            final_norm="gpt_neox.final_layer_norm",
        ),
        # One norm feeds both attention and MLP.
        Family("cohere", mlp_norm="input_layernorm", logit_factor="logit_scale"),
        Family(
            "falcon",
            layers="transformer.h",
            attention="self_attention",
            attention_norm=("ln_attn", "input_layernorm"),
            mlp_norm=("ln_mlp", "input_layernorm"),
            cache="layer_past",
            layer_gives_tuple=True,
            final_norm="transformer.ln_f",
            on=("new_decoder_architecture",),
            off=("alibi",),
        ),
        Family(
            "gpt2",
            layers="transformer.h",
            attention="attn",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            final_norm="transformer.ln_f",
            off=("add_cross_attention",),
        ),
        # Which experts run is a routing of its own; theirs is left alone.
        Family("mixtral", layer_types=_EITHER, granularities=_ATTENTION_ONLY),
        Family("qwen3_moe", layer_types=_EITHER, granularities=_ATTENTION_ONLY),
        Family("gpt_oss", layer_types=_EITHER, granularities=_ATTENTION_ONLY),
    )
}

# Rows that users bring, beside the table: see `register`.
_registered: dict[str, Family] = {}
_assumed: ContextVar[Family | None] = ContextVar("row on trial", default=None)


def register(row: Family) -> None:
    """Add a row to the table for the rest of the process; it replaces one registered before.

    Raises:
        ModelError: the architecture has a row of its own that says something else.
    """
    built_in = FAMILIES.get(row.model_type)
    if built_in is None:
        _registered[row.model_type] = row
    elif row != built_in:
        raise ModelError(
            f"architecture '{row.model_type}' has a built-in row, which no other may replace.",
            "Leave model.family out of the recipe.",
        )


@contextmanager
def registered(row: Family) -> Iterator[None]:
    """`register` for the duration of the block.

    Raises:
        ModelError: see `register`.
    """
    saved = dict(_registered)
    register(row)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(saved)


@contextmanager
def assumed(row: Family) -> Iterator[None]:
    """Take this row for its architecture in the block, built-in or not: to put a row to the test.

    Patches and split models made in the block go on by it.
    """
    token = _assumed.set(row)
    try:
        yield
    finally:
        _assumed.reset(token)


def row_for(model_type: str) -> Family | None:
    """The row of an architecture, built-in or registered; None where there is none."""
    trial = _assumed.get()
    if trial is not None and trial.model_type == model_type:
        return trial
    return FAMILIES.get(model_type) or _registered.get(model_type)


def require_parts(model: PreTrainedModel, family: Family) -> None:
    """Refuse a row that names what the model does not have.

    Raises:
        ModelError: a path that leads nowhere, by the row's field.
    """

    def has(*path: str) -> bool:
        try:
            model.get_submodule(".".join(path))
        except (AttributeError, TypeError):
            return False
        return True

    lost = [
        f"{field} = {getattr(family, field)!r}"
        for field in ("layers", "final_norm", "head")
        if not has(getattr(family, field))
    ]
    if not lost:
        for field in _IN_LAYER:
            names = getattr(family, field)
            every = (names,) if isinstance(names, str) else names
            layers = range(len(family.decoder_layers(model)))
            if names and not all(any(has(family.layers, str(i), n) for n in every) for i in layers):
                lost.append(f"{field} = {names!r}")
    if lost:
        raise ModelError(
            f"the row of '{family.model_type}' names what a {type(model).__name__} does not have: "
            f"{', '.join(lost)}.",
            "Correct model.family; `mskip doctor --model X` proposes a row.",
        )


_IN_LAYER = (
    *("attention", "attention_norm", "attention_post_norm"),
    *("mlp", "mlp_norm", "mlp_post_norm"),
)


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
    family = row_for(model_type)
    if family is None:
        raise ModelError(
            f"architecture '{model_type}' is not supported; supported: "
            f"{', '.join(sorted({**FAMILIES, **_registered}))}.",
            "Try `mskip doctor --model X`: it proposes a row for model.family of a recipe, and "
            "proves it. The built-in rows are in compressor/families.py.",
        )
    if unknown := layer_types_of(config) - family.layer_types:
        supported = " and ".join(sorted(family.layer_types)).replace("_", " ")
        raise ModelError(
            f"this '{model_type}' model has layers other than {supported} "
            f"({', '.join(sorted(unknown))}), which its row does not support.",
        )
    if missing := [name for name in family.on if not getattr(config, name, None)]:
        raise ModelError(
            f"this '{model_type}' model is configured without {', '.join(missing)}, which its row "
            "needs."
        )
    if on := [name for name in family.off if getattr(config, name, None)]:
        raise ModelError(
            f"this '{model_type}' model is configured with {', '.join(on)}, which its row does "
            "not support."
        )
    return family
