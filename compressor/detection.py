"""Proposing a row for an architecture that has none.

`detect` watches one forward pass: what a module is, is known by what it is given and what
becomes of what it gives. What it proposes is not more than a proposal:
`mskip.compressor.proof` judges it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mskip.compressor.errors import ModelError
from mskip.compressor.families import FULL, SLIDING, Family, layer_types_of
from mskip.compressor.patching import by_name
from mskip.compressor.sublayers import Granularity
from mskip.compressor.trial import CLOSE, distance, reason_of, tensor_given, tensor_in

_LOGITS = {
    "logit_factor": "logit_scale",
    "logit_divisor": "logits_scaling",
    "logit_cap": "final_logit_softcapping",
}
_RESIDUAL = "residual_multiplier"
_ALL: frozenset[Granularity] = frozenset({"attention", "mlp", "block"})


# -- watching a forward pass ------------------------------------------------------------------


@dataclass(frozen=True)
class _Event:
    """One call of a module: its path, its arguments by name, and what it returned.

    ``value`` is a copy of ``gives``, which a model may add to in place.
    """

    path: str
    module: nn.Module
    given: Tensor
    arguments: dict[str, Any]
    returned: Any
    value: Tensor

    @property
    def gives(self) -> Tensor:
        return tensor_in(self.returned)

    def cache_name(self) -> str | None:
        """The argument that holds the cache."""
        return next((k for k, v in self.arguments.items() if isinstance(v, Cache)), None)


def _watch(model: PreTrainedModel) -> tuple[list[_Event], Tensor]:
    """Every call of one forward pass with a cache, in the order of return, and the logits."""
    events: list[_Event] = []
    handles = []

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            named = by_name(module.forward, args, kwargs)
            if any(isinstance(value, Tensor) for value in named.values()):
                given = tensor_given(module, args, kwargs)
                first = output[0] if isinstance(output, tuple | list) and output else output
                if isinstance(first, Tensor):
                    events.append(_Event(path, module, given, named, output, first.clone()))

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_hook(hook_of(path), with_kwargs=True))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 6), generator=generator)
    try:
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(6).expand(2, 6),
                use_cache=True,
            ).logits
    except Exception as error:
        raise ModelError(
            f"a {type(model).__name__} does not take token ids, a mask, positions and a cache: "
            f"{reason_of(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return events, logits


def _same(one: Tensor, other: Tensor) -> bool:
    """The same numbers in the same memory, whatever their shape: nothing was computed between."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _is_norm(event: _Event) -> bool:
    """A norm has no matrix, and undoes any scale of its input."""
    if any(parameter.ndim > 1 for parameter in event.module.parameters()):
        return False
    if event.gives.shape != event.given.shape or not event.given.is_floating_point():
        return False
    try:
        with torch.no_grad():
            one, other = (event.module(event.given * scale) for scale in (64.0, 512.0))
    except Exception:  # A module that cannot be called so is no norm.
        return False
    return (
        isinstance(one, Tensor)
        and bool(one.any())
        and torch.allclose(one, other, rtol=1e-2, atol=1e-2)
    )


# -- the parts --------------------------------------------------------------------------------


def detect(model: PreTrainedModel) -> Family:
    """Propose a row for a model from its module tree and one forward pass.

    ``on`` and ``off`` stay empty: what other configurations of the architecture do is not seen.

    Args:
        model: a causal LM on the CPU, best a `tiny_copy`.

    Raises:
        ModelError: what cannot be found, or is not as a row can say it.
    """
    config = model.config
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' is an encoder-decoder, not a causal LM of decoder layers.")
    kinds = layer_types_of(config)
    if other := kinds - {FULL, SLIDING}:
        raise ModelError(
            f"'{name}' has layers of {', '.join(sorted(other))}; caches of routed layers know "
            "full and sliding attention."
        )
    path, layers = _layers(model)
    events, logits = _watch(model)
    blocks = [_in_layer(f"{path}.{i}", layer, events, name) for i, layer in enumerate(layers)]
    # What may be routed may be routed in every layer.
    offered = frozenset.intersection(*(each.pop("granularities") for each in blocks))
    first = blocks[0]
    for number, each in enumerate(blocks):
        if each != first:
            different = next(k for k in first if each[k] != first[k])
            raise ModelError(
                f"the layers of '{name}' are not alike: {different} is {first[different]!r} in "
                f"layer 0 and {each[different]!r} in layer {number}."
            )
    residual = _residual(model, f"{path}.", len(layers), events, first)
    stream = next(e.gives for e in events if e.path == f"{path}.{len(layers) - 1}")
    head, norm = _end(model, events, stream)
    row = Family(
        name, layers=path, head=head, final_norm=norm, residual_factor=residual,
        layer_types=kinds, granularities=offered, **first,
    )  # fmt: skip
    return _with_logits(model, row, events, logits)


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
        if len({type(layer) for layer in module}) == 1
    ]
    if not found:
        raise ModelError(
            f"no list of {count} equal decoder layers is found in a {type(model).__name__}."
        )
    return min(found, key=lambda each: each[0].count("."))


def _in_layer(path: str, layer: nn.Module, events: list[_Event], name: str) -> dict[str, Any]:
    """The fields of the row that are about one layer."""
    own = next((e for e in events if e.path == path), None)
    if own is None:
        raise ModelError(f"'{name}' does not run its layer {path} in a forward pass.")
    inner = [e for e in events if e.path.startswith(f"{path}.")]
    children = [e for e in inner if "." not in e.path[len(path) + 1 :]]
    norms = [e for e in children if _is_norm(e)]
    attention, cache = _attention(own, inner, name)
    mlp, mlp_norm, whole = _mlp(own, children, norms, attention)

    def local(event: _Event | None) -> str | None:
        return None if event is None else event.path[len(path) + 1 :]

    def fed_by(event: _Event) -> _Event | None:
        return next((n for n in norms if _same(n.gives, event.given)), None)

    def into(event: _Event) -> _Event | None:
        return next((n for n in norms if _same(n.given, event.gives)), None)

    attention_norm = fed_by(attention)
    if attention_norm is None and not _same(attention.given, own.given):
        raise ModelError(
            f"the attention of '{name}' is given neither the residual stream nor what a norm of "
            "it gives."
        )
    posts = [into(attention), into(mlp)]
    last = next((n for n in norms if _same(n.gives, own.gives)), None)
    if last is not None and last not in posts:
        raise ModelError(
            f"the layers of '{name}' end with a norm of the residual stream itself "
            f"({local(last)}), so that no skip leaves it unchanged."
        )
    experts = any("expert" in type(m).__name__.lower() for m in mlp.module.modules())
    # Which experts run is a routing of its own; theirs is left alone.
    granularities = frozenset({"attention"}) if experts else _ALL - (set() if whole else {"mlp"})
    return {
        "attention": local(attention),
        "attention_norm": local(attention_norm),
        "attention_post_norm": local(posts[0]),
        "mlp": local(mlp),
        "mlp_norm": local(mlp_norm),
        "mlp_post_norm": local(posts[1]),
        "cache": cache,
        "layer_gives_tuple": isinstance(own.returned, tuple),
        "granularities": granularities,
    }


def _attention(own: _Event, inner: list[_Event], name: str) -> tuple[_Event, str]:
    """The outermost module in a layer that is handed the cache, and under which name."""
    handed = [e for e in inner if e.cache_name() is not None]
    outer = [e for e in handed if not any(e.path.startswith(f"{o.path}.") for o in handed)]
    if len(outer) != 1:
        which = ", ".join(e.path for e in outer) or "none"
        raise ModelError(
            f"a layer of '{name}' should hand the cache to one attention module; it does to: "
            f"{which}."
        )
    attention = outer[0]
    if not isinstance(attention.returned, tuple) or len(attention.returned) != 2:
        raise ModelError(f"the attention of '{name}' does not return (output, weights).")
    cache = cast(str, attention.cache_name())
    if own.cache_name() != cache:
        raise ModelError(
            f"a layer of '{name}' takes the cache as {own.cache_name()}, its attention as {cache}."
        )
    return attention, cache


def _mlp(
    own: _Event, children: list[_Event], norms: list[_Event], attention: _Event
) -> tuple[_Event, _Event | None, bool]:
    """What the MLP adds comes from: a module, the norm before it, and whether it is all of it."""

    def parts() -> Iterator[_Event]:
        for event in children:
            in_attention = event is attention or attention.path.startswith(f"{event.path}.")
            if not in_attention and any(p.ndim > 1 for p in event.module.parameters()):
                yield event

    every = list(parts())
    if not every:
        raise ModelError(f"no MLP is found beside the attention in a {type(own.module).__name__}.")
    last = every[-1]
    tensors = [value for value in last.arguments.values() if value is not None]
    whole = len(every) == 1 and len(tensors) == 1 and last.gives.shape == own.given.shape
    return last, next((n for n in norms if _same(n.gives, every[0].given)), None), whole


def _residual(
    model: PreTrainedModel, prefix: str, count: int, events: list[_Event], names: dict[str, Any]
) -> str | None:
    """The entry that multiplies what is added; proves that nothing but the two is added."""
    added = [names[f"{kind}_post_norm"] or names[kind] for kind in ("attention", "mlp")]
    calls = {e.path: e for e in events}
    factor = getattr(model.config, _RESIDUAL, None)
    for entry, value in ((_RESIDUAL, factor), (None, 1.0)):
        if value is None:
            continue
        off = 0.0
        for number in range(count):
            own = calls[f"{prefix}{number}"]
            parts = [calls[f"{prefix}{number}.{name}"].value for name in added]
            total = sum(part.reshape(own.given.shape) for part in parts)
            off = max(off, distance(own.gives, own.given + value * total))
        if off <= CLOSE:
            return entry
    raise ModelError(
        f"a layer of '{model.config.model_type}' is not its input plus what {' and '.join(added)} "
        "give, so that a skip has no place in it."
    )


def _end(model: PreTrainedModel, events: list[_Event], stream: Tensor) -> tuple[str, str]:
    """Paths of head and final norm."""
    embedding = model.get_output_embeddings()
    head = next((e for e in events if e.module is embedding), None)
    if head is None:
        raise ModelError(f"no language-model head is found in a {type(model).__name__}.")
    for event in events:
        if _same(event.given, stream) and _same(event.gives, head.given) and _is_norm(event):
            return head.path, event.path
    raise ModelError(
        f"no final norm is found between the last layer and the head of a {type(model).__name__}."
    )


def _with_logits(
    model: PreTrainedModel, row: Family, events: list[_Event], logits: Tensor
) -> Family:
    """The row with those of the known entries that make the logits of the head's output."""
    hidden = next(e.given for e in events if e.path == row.head)
    there: dict[str, Any] = {
        f: entry for f, entry in _LOGITS.items() if hasattr(model.config, entry)
    }
    for size in range(len(there), -1, -1):
        for some in combinations(there.items(), size):
            candidate = replace(row, **dict(some))
            with torch.no_grad():
                if torch.equal(candidate.logits_of(model, hidden), logits):
                    return candidate
    raise ModelError(
        f"the logits of '{row.model_type}' are not what its head gives, and none of "
        f"{', '.join(_LOGITS.values())} makes up for it."
    )
