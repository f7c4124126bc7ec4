"""Per-token routing attached to a model, so that ordinary calls and ``generate`` skip."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.patching import Patch, by_name
from mskip.compressor.router import Routers
from mskip.compressor.skipping import as_tau, cache_of_call, real_positions
from mskip.compressor.sublayers import require_unit
from mskip.compressor.token_cache import TokenCache
from mskip.compressor.tokenwise import TokenPass, fresh_token_decisions, require_masks


class TokenSkip:
    """A model with its routers attached, routed token by token; see `MindSkip` for the manner.

    Every call scores its own tokens, answers too, and the `TokenCache` that it returns or is
    given holds keys and values of executed tokens only. The keyword argument ``routing`` (a
    pass) takes full control.

    Args:
        model: a supported causal LM with "sdpa" or "eager" attention.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.

    Raises:
        ModelError: see `Patch` and `require_masks`; or the routers decide once a sequence.
    """

    def __init__(
        self, model: PreTrainedModel, routers: Routers, tau: float | Tensor | list[float] = 0.5
    ) -> None:
        require_unit(routers.sublayers.unit, "token", "TokenSkip")
        require_masks(model)
        self.model = model
        self.routers = routers.to(model.device)
        self.tau = as_tau(tau, len(routers.layers)).to(model.device)
        self._patch = Patch(model, routers.sublayers)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def detach(self) -> None:
        """Take routers and patches out; the model is bitwise what it was."""
        self._hook.remove()
        self._patch.restore()

    def __enter__(self) -> TokenSkip:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def cache(self) -> TokenCache:
        """An empty cache."""
        return TokenCache(self.model.config, self.routers.sublayers)

    def token_pass(self, real: Tensor, routing: Tensor | None = None) -> TokenPass:
        """A pass for one call without a cache; its ``decisions`` hold the outcome afterwards.

        Args:
            real: [batch, sequence], true on real tokens.
            routing: given decisions, [batch, sequence, routed] of -1, 0, 1.
        """
        decisions, scores = fresh_token_decisions(real, len(self.routers.layers))
        if routing is not None:
            decisions = routing.to(decisions, copy=True)
        return TokenPass(self.routers, self.tau, real, decisions, scores)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = by_name(module.forward, args, kwargs)
        if "routing" in kwargs:
            # The model would make a cache of its own, which cannot hold single tokens.
            kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
            return (), kwargs
        kwargs.pop("prompt_mask", None)  # Tokens of the answer decide for themselves too.
        real = real_positions(kwargs)
        cache = cache_of_call(kwargs, self.model, TokenCache, self.cache)
        kwargs["past_key_values"] = cache
        record = fresh_token_decisions(real, len(self.routers.layers))
        if cache is not None:
            record = cache.extend(*record)
        kwargs["routing"] = TokenPass(self.routers, self.tau, real, *record)
        return (), kwargs
