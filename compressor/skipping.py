"""A model that routes by itself, in ordinary calls and in ``model.generate``.

`MindSkip` patches the model and adds the bookkeeping: masks, decisions, caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mskip.compressor.cache import RoutedCache
from mskip.compressor.errors import ModelError
from mskip.compressor.patching import Patch, by_name
from mskip.compressor.router import Routers
from mskip.compressor.routing import UNDECIDED, HardPass, forced, fresh_decisions
from mskip.compressor.sublayers import require_unit


def real_positions(kwargs: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """Which of a call's own positions count, [batch, sequence] bool.

    Args:
        kwargs: the arguments of the model's call.
        mask: [batch, sequence] or [batch, past + sequence]; None takes the attention mask.

    Raises:
        ModelError: the mask is not two-dimensional.
    """
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    batch, positions = tokens.shape[:2]
    if mask is None:
        mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, positions, dtype=torch.bool, device=tokens.device)
    if mask.ndim != 2:
        raise ModelError(
            "a routed model needs the two-dimensional attention mask "
            "([batch, past + sequence], 1 on real tokens): padding must stay out of the scores."
        )
    return mask[:, -positions:].bool()


AnyCache = TypeVar("AnyCache", bound=Cache)


def cache_of_call(
    kwargs: dict[str, Any],
    model: PreTrainedModel,
    kind: type[AnyCache],
    empty: Callable[[], AnyCache],
) -> AnyCache | None:
    """The cache that a call is to fill; None where it is to fill none.

    `generate` and many callers bring an empty DynamicCache and go on holding that very
    object, so it is turned into a cache of the right kind rather than replaced.

    Args:
        kwargs: the arguments of the model's call.
        model: the model.
        kind: the right kind.
        empty: makes one.

    Raises:
        ModelError: the call brings a cache of another kind, or one that is not empty.
    """
    cache = kwargs.get("past_key_values")
    if cache is None:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = model.config.use_cache
        return empty() if use_cache else None
    if isinstance(cache, kind):
        return cache
    if type(cache) is not DynamicCache or cache.get_seq_length() > 0 or cache.offloading:
        raise ModelError(
            f"this {type(cache).__name__} cannot carry routing decisions.",
            "Use the cache that the attached model returns, or the cache() of what is attached.",
        )
    cache.__class__ = kind  # type: ignore[assignment]
    cache.__dict__.update(empty().__dict__)
    return cache  # type: ignore[return-value]


def as_tau(tau: float | Tensor | list[float], routed: int) -> Tensor:
    """One threshold a routed sublayer, [routed], float32, from one number or as many numbers."""
    values = torch.as_tensor(tau, dtype=torch.float32)
    return values.expand(routed).clone() if values.ndim == 0 else values.reshape(routed).clone()


class MindSkip:
    """A model with its routers attached: ordinary calls and ``generate`` skip.

    Every call without ``past_key_values`` decides anew; a call with the
    `RoutedCache` that an earlier call returned keeps that call's decisions.
    Two more keyword arguments are understood by the attached model:
    ``prompt_mask`` ([batch, sequence] bool) where the call's positions hold an
    answer too, and ``routing`` (a pass) to take full control.

    Args:
        model: a supported causal LM.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.

    Raises:
        ModelError: see `Patch`; or the routers decide once a token.
    """

    def __init__(
        self, model: PreTrainedModel, routers: Routers, tau: float | Tensor | list[float] = 0.5
    ) -> None:
        require_unit(routers.sublayers.unit, "sequence", "MindSkip")
        self.model = model
        self.routers = routers.to(model.device)
        self.tau = as_tau(tau, len(routers.layers)).to(model.device)
        self._patch = Patch(model, routers.sublayers)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def detach(self) -> None:
        """Take routers and patches out; the model is bitwise what it was."""
        self._hook.remove()
        self._patch.restore()

    def __enter__(self) -> MindSkip:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def cache(self, routing: Tensor | None = None) -> RoutedCache:
        """An empty cache; ``routing`` ([batch, routed] of -1, 0, 1) gives its decisions."""
        cache = RoutedCache(self.model.config, self.routers.sublayers)
        if routing is not None:
            cache.open(len(routing), self.model.device, forced(routing))
        return cache

    def hard_pass(self, prompt_mask: Tensor, routing: Tensor | None = None) -> HardPass:
        """A pass for one call without a cache; its ``decisions`` hold the outcome afterwards.

        Args:
            prompt_mask: [batch, sequence], true on prompt positions.
            routing: given decisions, [batch, routed] of -1, 0, 1.
        """
        decisions, scores = fresh_decisions(len(prompt_mask), len(self.routers.layers))
        if routing is not None:
            decisions = forced(routing)
        device = prompt_mask.device
        return HardPass(
            self.routers, self.tau, prompt_mask, decisions.to(device), scores.to(device)
        )

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = by_name(module.forward, args, kwargs)
        if "routing" in kwargs:
            # The model would make a cache of its own, which cannot hold skipped rows.
            kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
            return (), kwargs
        given = kwargs.pop("prompt_mask", None)
        prompt_mask = real_positions(kwargs, given)
        cache = cache_of_call(kwargs, self.model, RoutedCache, self.cache)
        kwargs["past_key_values"] = cache
        if cache is None:
            kwargs["routing"] = self.hard_pass(prompt_mask)
        else:
            cache.open(len(prompt_mask), prompt_mask.device)
            assert cache.decisions is not None
            assert cache.scores is not None
            kwargs["routing"] = HardPass(
                self.routers, self.tau, prompt_mask, cache.decisions, cache.scores
            )
            undecided = (cache.decisions == UNDECIDED).any(dim=1)
            if bool((undecided & ~prompt_mask.any(dim=1)).any()):
                raise ModelError(
                    "a sequence's first chunk is all padding: there is nothing to decide from.",
                    "Pad chunks of a long prompt on the right, or give the decisions beforehand.",
                )
        return (), kwargs
