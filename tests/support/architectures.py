"""Tiny random models, one or more for each row of the table of architectures.

Every feature that a row has to live with is switched on: windows shorter than the
prompts, norms of queries and keys, soft-capping, parallel residuals, multipliers, layers
without rotary positions, biases.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

LAYERS, HIDDEN, VOCABULARY = 5, 32, 97
WINDOW = 4
"""Positions that a sliding layer sees: fewer than most prompts and every generation have."""
SLIDING, FULL = "sliding_attention", "full_attention"

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_ALTERNATING = [SLIDING, FULL, SLIDING, FULL, SLIDING]


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model, and where its parts are.

    Attributes:
        name: transformers' prefix: ``Llama`` for LlamaConfig and LlamaForCausalLM.
        entries: of the configuration, beside what Llama-like ones share.
        layers: path of the decoder layers.
        attention: path of the attention's last projection within a layer.
        mlp: path of the MLP's last projection within a layer, or of all of it.
        parallel: the MLP reads what the attention reads, not what it has added to.
        like_llama: the configuration has Llama's names.
        model: class of the model where it is not ``<name>ForCausalLM``.
        config: class of the configuration where it is not ``<name>Config``.
    """

    name: str
    entries: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    parallel: bool = False
    like_llama: bool = True
    model: str | None = None
    config: str | None = None

    def configuration(self) -> Any:
        """The configuration."""
        kind = getattr(transformers, self.config or f"{self.name}Config")
        return kind(**{**(_COMMON if self.like_llama else _TOKENS), **self.entries})


_NEOX: dict[str, Any] = {
    **{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
_NEOX_PARTS: dict[str, Any] = {
    "like_llama": False,
    "layers": "gpt_neox.layers",
    "attention": "attention.dense",
    "mlp": "mlp.dense_4h_to_h",
}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "new_decoder_architecture": True,
    "bias": True,
    "tie_word_embeddings": False,
}
_FALCON_PARTS: dict[str, Any] = {
    "like_llama": False,
    "layers": "transformer.h",
    "attention": "self_attention.dense",
    "mlp": "mlp.dense_4h_to_h",
    "parallel": True,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attention_bias": True,
    "sliding_window": WINDOW,
    "layer_types": _ALTERNATING,
    "final_logit_softcapping": 3.0,
}
_STABLELM: dict[str, Any] = {"use_qkv_bias": True, "qk_layernorm": True}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "sliding_window": WINDOW}

# After the comma: which of the architecture's switches is on.
MODELS: dict[str, Tiny] = {
    "llama": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("Mistral", {"sliding_window": None}),
    "mistral, sliding": Tiny("Mistral", {"sliding_window": WINDOW}),
    "qwen2": Tiny("Qwen2"),
    "qwen2, sliding": Tiny(
        "Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    ),
    "qwen3, sliding": Tiny(
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attention_bias": True,
            "head_dim": 16,
        },
    ),
    "smollm3, sliding": Tiny(
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attention_bias": True,
        },
    ),
    "phi3, sliding": Tiny("Phi3", {"sliding_window": WINDOW}),
    "granite": Tiny(
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "gemma2, sliding": Tiny("Gemma2", {**_GEMMA, "attn_logit_softcapping": 1.5}),
    "gemma3_text, sliding": Tiny("Gemma3", _GEMMA, config="Gemma3TextConfig"),
    "olmo2": Tiny("Olmo2", {"attention_bias": True}),
    "stablelm": Tiny("StableLm", {**_STABLELM, "use_parallel_residual": False}),
    "stablelm, parallel": Tiny(
        "StableLm", {**_STABLELM, "use_parallel_residual": True}, parallel=True
    ),
    "gpt_neox": Tiny("GPTNeoX", {**_NEOX, "use_parallel_residual": False}, **_NEOX_PARTS),
    "gpt_neox, parallel": Tiny(
        "GPTNeoX", {**_NEOX, "use_parallel_residual": True}, **_NEOX_PARTS, parallel=True
    ),
    "cohere": Tiny(
        "Cohere", {"use_qk_norm": True, "logit_scale": 0.4, "attention_bias": True}, parallel=True
    ),
    "falcon": Tiny("Falcon", {**_FALCON, "num_ln_in_parallel_attn": 2}, **_FALCON_PARTS),
    "falcon, one norm": Tiny("Falcon", {**_FALCON, "num_ln_in_parallel_attn": 1}, **_FALCON_PARTS),
    "gpt2": Tiny(
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 512,
            "n_inner": 48,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
        layers="transformer.h",
        attention="attn.c_proj",
        mlp="mlp.c_proj",
        like_llama=False,
        model="GPT2LMHeadModel",
    ),
    "mixtral, sliding": Tiny("Mixtral", {**_EXPERTS, "num_local_experts": 4}, mlp="mlp"),
    "qwen3_moe, sliding": Tiny(
        "Qwen3Moe",
        {
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "use_sliding_window": True,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
        mlp="mlp",
    ),
    # Attention sinks: a logit of every head that takes part in the softmax.
    "gpt_oss, sliding": Tiny(
        "GptOss",
        {
            **_EXPERTS,
            "num_local_experts": 4,
            "head_dim": 16,
            "layer_types": _ALTERNATING,
            "attention_bias": True,
        },
        mlp="mlp",
    ),
}


def row_of(name: str) -> str:
    """The row that a tiny model stands for."""
    return name.partition(",")[0]


def class_of(name: str) -> Any:
    """The class of a tiny model."""
    tiny = MODELS[name]
    return getattr(transformers, tiny.model or f"{tiny.name}ForCausalLM")


def make(
    name: str,
    attention: str | None = None,
    seed: int = 0,
    entries: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A random model; biases and norms, which begin as zeros and ones, are random too.

    Args:
        name: of `MODELS`.
        attention: implementation; None takes "sdpa", or "eager" where it has to be.
        seed: of the weights.
        entries: of the configuration, beside those of `MODELS`.
    """
    torch.set_num_threads(1)  # The models are too small for two.
    kind = class_of(name)
    tiny = MODELS[name]
    config = replace(tiny, entries={**tiny.entries, **(entries or {})}).configuration()
    config._attn_implementation = attention or ("sdpa" if kind._supports_sdpa else "eager")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn(parameter.shape) * 0.3
    model.generation_config.eos_token_id = None
    ready: PreTrainedModel = model.eval().requires_grad_(False)
    return ready


def unsupported() -> PreTrainedModel:
    """A tiny model of an architecture that has no row."""
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=16,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def layers_of(name: str, model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    layers = model.get_submodule(MODELS[name].layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
