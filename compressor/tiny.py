"""A small random model from a configuration: an architecture is judged without its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.families import SLIDING, layer_types_of
from mskip.compressor.trial import reason_of

_WIDTHS = ("hidden_size", "word_embed_proj_dim", "embedding_size")
_INNER = (
    *("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS, _VOCABULARY, _WINDOW, _LAYERS = 4, 128, 4, 4
_HEAD_WIDTHS = (8, 16, 32, 64)
_LARGEST = 4 << 30
"""Bytes that a copy may take, which matters where widths cannot be shrunk."""


def tiny_copy(config: Any, *, seed: int = 0, trust_remote_code: bool = False) -> PreTrainedModel:
    """A small random causal LM of a configuration's architecture, with every switch as it is.

    There is a layer or two of each kind, and few tokens; a sliding window in use is shorter
    than any prompt that matters. Widths are shrunk as far as the model's code runs with them.

    Args:
        config: as `AutoConfig` loads it; it is not changed.
        seed: of the weights; biases and norms are random too.
        trust_remote_code: run the model's own code.

    Returns:
        In float32 on the CPU, frozen, in evaluation mode.

    Raises:
        ModelError: not a causal LM's configuration, or no small copy of it runs.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' is an encoder-decoder, not a causal LM of decoder layers.")
    if config.get_text_config() is not config:
        raise ModelError(f"'{name}' is made of several models; mskip takes a causal LM alone.")
    failures: list[Exception] = []
    for width in (*_HEAD_WIDTHS, None):
        try:
            return _random(_shrunk(config, width), seed, trust_remote_code)
        except Exception as error:  # of the model's code: other widths may please it
            failures.append(error)
    reasons = dict.fromkeys(map(reason_of, (failures[0], failures[-1])))
    raise ModelError(
        f"no small copy of a '{name}' model runs: {'; with its own widths: '.join(reasons)}"
    ) from failures[0]


def _random(config: Any, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    def make() -> PreTrainedModel:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.float32
        )
        return made

    with torch.device("meta"):
        needed = 4 * sum(parameter.numel() for parameter in make().parameters())
    if needed > _LARGEST:
        raise ModelError(
            f"even with {config.num_hidden_layers} layers it takes {needed >> 30} GiB."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn(parameter.shape) * 0.3
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    return model


def _shrunk(config: Any, head_width: int | None) -> Any:
    """A copy of a configuration with few layers and tokens, and heads of ``head_width``.

    None leaves all widths as they are.
    """
    small = copy.deepcopy(config)
    entries = small.to_dict()

    def put(name: str, value: Any) -> None:
        real = small.attribute_map.get(name, name)
        if entries.get(real) is not None:
            setattr(small, real, value)

    _keep_layers(small, entries)
    put("vocab_size", min(config.vocab_size, _VOCABULARY))
    for name, token in _TOKENS.items():
        put(name, token)
    for name in ("dtype", "quantization_config"):
        if name in small.__dict__:
            del small.__dict__[name]
    if SLIDING in layer_types_of(config):
        put("sliding_window", _WINDOW)
    put("initializer_range", 0.2)  # so wide that a skip shows
    if head_width is None:
        return small
    heads, hidden = config.num_attention_heads, config.hidden_size
    own = entries.get("head_dim")
    if "qk_rope_head_dim" not in entries:  # latent attention has widths of its own
        put("head_dim", head_width * (1 if own == hidden // heads else 2))
    put("num_attention_heads", _HEADS)
    for name in _KV_HEADS:
        groups = entries.get(small.attribute_map.get(name, name))
        put(name, groups if groups in (None, 1) else _HEADS if groups == heads else _HEADS // 2)
    for name in _WIDTHS:
        if getattr(config, name, None) == hidden:
            put(name, _HEADS * head_width)
    for name in _INNER:
        put(name, 6 * head_width)
    for name in _EXPERTS:
        put(name, min(getattr(config, name, None) or 4, 4))
    put("num_experts_per_tok", min(getattr(config, "num_experts_per_tok", None) or 2, 2))
    for name in ("n_group", "topk_group"):
        put(name, 1)
    put("rotary_dim", head_width // 2)
    _shorten_factors(small, getattr(small, "head_dim", None) or head_width)
    return small


def _shorten_factors(small: Any, head_width: int) -> None:
    """Rotary factors, which are one a pair of channels, as many as there are left."""
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict):
        pairs = int(head_width * rope.get("partial_rotary_factor", 1.0)) // 2
        for name, value in rope.items():
            if isinstance(value, list):
                rope[name] = value[:pairs]


def _keep_layers(small: Any, entries: dict[str, Any]) -> None:
    """Keep two layers of each kind, with their places in the lists of the configuration."""
    count = small.num_hidden_layers
    lists = {
        name: value
        for name, value in entries.items()
        if isinstance(value, list | tuple) and len(value) == count
        if not _are_indices(value)
    }
    kept = _representatives(list(zip(*lists.values(), strict=True)) or [()] * count)
    for name, values in lists.items():
        setattr(small, name, [values[layer] for layer in kept])
    small.num_hidden_layers = len(kept)


def _are_indices(values: Sequence[Any]) -> bool:
    """Numbers of layers, not something about each layer."""
    return all(type(value) is int for value in values) and len(set(values)) == len(values) > 2


def _representatives(kinds: Sequence[tuple[Any, ...]]) -> list[int]:
    """The first two layers of each kind, and more where that makes too few; ascending."""
    words = [repr(kind) for kind in kinds]
    kept = [i for i, word in enumerate(words) if words[:i].count(word) < 2]
    more = [i for i in range(len(words)) if i not in kept]
    return sorted(kept + more[: max(0, _LAYERS - len(kept))])
