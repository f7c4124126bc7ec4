"""Placing the skip in a Hugging Face model, and taking it out again.

`patched` replaces the ``forward`` of the routed modules so that a *pass* in the
keyword argument ``routing`` decides what runs; without a pass the model is
dense. `MindSkip` adds the bookkeeping that makes ordinary calls and
``model.generate`` route by themselves. Both restore the model exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mskip.compressor.cache import RoutedCache, RoutedLayer
from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ModelError
from mskip.compressor.families import family_of
from mskip.compressor.router import Routers
from mskip.compressor.routing import (
    UNDECIDED,
    Call,
    HardPass,
    Pass,
    Rows,
    forced,
    fresh_decisions,
)
from mskip.compressor.sublayers import Sublayers, as_sublayers


def take_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Rows of every per-sequence tensor in ``value``; what all sequences share stays whole.

    A tensor is per-sequence where it has two dimensions or more and its first
    is the batch: masks [batch, 1, query, key], cos and sin [batch, sequence, dim].

    Raises:
        ModelError: flex attention's block mask, which cannot be taken apart.
    """
    if isinstance(value, BlockMask):
        raise ModelError(
            "flex attention cannot run some sequences of a batch.",
            'Load the model with attn_implementation="sdpa", "eager" or "flash_attention_2".',
        )
    if isinstance(value, Tensor):
        per_sequence = value.ndim >= 2 and value.shape[0] == batch
        return value.index_select(0, rows) if per_sequence else value
    if isinstance(value, tuple | list):
        return type(value)(take_rows(item, rows, batch) for item in value)
    return value


def _note_skip(cache: Any, layer: int, positions: int) -> None:
    """Tell a routed layer's cache that nobody executed these positions."""
    if cache is not None:
        routed_layer = cache.layers[layer]
        assert isinstance(routed_layer, RoutedLayer)
        routed_layer.skip(positions)


def _some(hidden: Tensor, rows: Rows) -> Tensor:
    return hidden if rows is None else hidden.index_select(0, rows)


def _nothing(hidden: Tensor, index: int, compensation: Compensation | None) -> Tensor:
    """What a skipped attention or MLP adds to the residual stream."""
    return torch.zeros_like(hidden) if compensation is None else compensation(index, hidden)


def _attention_forward(
    index: int, layer: int, dense: Callable[..., Any], compensation: Compensation | None
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing: Pass | None = kwargs.pop("routing", None)
        if routing is None:
            return dense(hidden_states, *args, **kwargs)
        batch, positions = hidden_states.shape[:2]

        def execute(rows: Rows) -> Tensor:
            some = kwargs
            if rows is not None:
                some = {key: take_rows(value, rows, batch) for key, value in kwargs.items()}
            output: Tensor = dense(_some(hidden_states, rows), *args, **some)[0]
            return output

        def skip(rows: Rows) -> Tensor:
            if rows is None:
                _note_skip(kwargs.get("past_key_values"), layer, positions)
            return _nothing(_some(hidden_states, rows), index, compensation)

        return routing(Call(index, batch, lambda: hidden_states, execute, skip)), None

    return forward


# The layer hands its MLP the hidden state and nothing else, so the pass goes round it.
_pass_of_layer: ContextVar[Pass | None] = ContextVar("pass of the layer that runs", default=None)


def _layer_with_routed_mlp(dense: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, routing: Pass | None = None, **kwargs: Any) -> Any:
        token = _pass_of_layer.set(routing)
        try:
            return dense(*args, **kwargs)
        finally:
            _pass_of_layer.reset(token)

    return forward


def _mlp_forward(
    index: int, dense: Callable[..., Any], compensation: Compensation | None
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor) -> Any:
        routing = _pass_of_layer.get()
        if routing is None:
            return dense(hidden_states)

        def execute(rows: Rows) -> Tensor:
            output: Tensor = dense(_some(hidden_states, rows))
            return output

        def skip(rows: Rows) -> Tensor:
            return _nothing(_some(hidden_states, rows), index, compensation)

        return routing(Call(index, len(hidden_states), lambda: hidden_states, execute, skip))

    return forward


def _block_forward(
    index: int,
    layer: int,
    dense: Callable[..., Any],
    norm: nn.Module,
    compensation: Compensation | None,
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing: Pass | None = kwargs.pop("routing", None)
        if routing is None:
            return dense(hidden_states, *args, **kwargs)
        batch, positions = hidden_states.shape[:2]

        def execute(rows: Rows) -> Tensor:
            some = kwargs
            if rows is not None:
                some = {key: take_rows(value, rows, batch) for key, value in kwargs.items()}
            output: Tensor = dense(_some(hidden_states, rows), *args, **some)
            return output

        def skip(rows: Rows) -> Tensor:
            if rows is None:
                _note_skip(kwargs.get("past_key_values"), layer, positions)
            hidden = _some(hidden_states, rows)
            if compensation is not None:
                hidden = hidden + compensation(index, _some(call.hidden, rows))
            return hidden

        call = Call(index, batch, lambda: norm(hidden_states), execute, skip)
        return routing(call)

    return forward


class Patch:
    """The routed layers of a model, patched; `restore` takes the patch out.

    Args:
        model: a supported causal LM.
        sublayers: what is routed; a bare list of layers means their attention.

    Raises:
        ModelError: unsupported architecture, a layer out of range, or a model
            that is patched already.
    """

    def __init__(self, model: PreTrainedModel, sublayers: Sublayers | list[int]) -> None:
        family = family_of(model)
        blocks = family.decoder_layers(model)
        count = len(blocks)
        sublayers = as_sublayers(sublayers)
        layers, kind = sublayers.layers, sublayers.granularity
        if bad := [layer for layer in layers if not 0 <= layer < count]:
            raise ModelError(f"layers {bad} do not exist: the model has layers 0..{count - 1}.")
        if len(set(layers)) < len(layers):
            raise ModelError(f"layers {layers} name a layer twice.")
        # Any layer: a second pass would be handed to the first one's layers too.
        if any(_is_patched(module) for block in blocks for module in block.modules()):
            raise ModelError("this model has routers attached already; detach them first.")
        self._saved: list[tuple[nn.Module, Any]] = []
        for index, layer in enumerate(layers):
            module = family.sublayer_of(model, layer, kind)
            dense, compensation = module.forward, sublayers.compensation
            if kind == "attention":
                self._replace(module, _attention_forward(index, layer, dense, compensation))
            elif kind == "mlp":
                self._replace(module, _mlp_forward(index, dense, compensation))
                self._replace(blocks[layer], _layer_with_routed_mlp(blocks[layer].forward))
            else:
                norm = family.norm_of(model, layer, kind)
                self._replace(module, _block_forward(index, layer, dense, norm, compensation))

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._saved.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def restore(self) -> None:
        """Put every ``forward`` back as it was."""
        for module, previous in reversed(self._saved):
            if previous is None:
                del module.forward
            else:
                module.forward = previous
        self._saved.clear()


def _is_patched(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__module__", None) == __name__


@contextmanager
def patched(model: PreTrainedModel, sublayers: Sublayers | list[int]) -> Iterator[None]:
    """Patch the routed sublayers for the duration of the block."""
    patch = Patch(model, sublayers)
    try:
        yield
    finally:
        patch.restore()


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
        ModelError: see `Patch`.
    """

    def __init__(
        self, model: PreTrainedModel, routers: Routers, tau: float | Tensor | list[float] = 0.5
    ) -> None:
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
        if args:  # By name from here on: a mask given by position is a mask all the same.
            named = inspect.signature(module.forward).bind_partial(*args).arguments
            args, kwargs = (), {**named, **kwargs}
        if "routing" in kwargs:
            # The model would make a cache of its own, which cannot hold skipped rows.
            kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
            return args, kwargs
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        batch, positions = tokens.shape[:2]
        mask = kwargs.pop("prompt_mask", None)
        if mask is None:
            mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, positions, dtype=torch.bool, device=tokens.device)
        if mask.ndim != 2:
            raise ModelError(
                "a routed model needs the two-dimensional attention mask "
                "([batch, past + sequence], 1 on real tokens): padding must stay out of the scores."
            )
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = self.model.config.use_cache
            cache = self.cache() if use_cache else None
        elif not isinstance(cache, RoutedCache):
            self._adopt(cache)
        kwargs["past_key_values"] = cache
        prompt_mask = mask[:, -positions:].bool()
        if cache is None:
            kwargs["routing"] = self.hard_pass(prompt_mask)
        else:
            cache.open(batch, tokens.device)
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
        return args, kwargs

    def _adopt(self, cache: Cache) -> None:
        # `generate` and many callers bring an empty DynamicCache and go on holding that
        # very object, so it is turned into a routed one rather than replaced.
        if type(cache) is not DynamicCache or cache.get_seq_length() > 0 or cache.offloading:
            raise ModelError(
                f"this {type(cache).__name__} cannot carry routing decisions.",
                "Use the cache that the attached model returns, or MindSkip.cache().",
            )
        routed = self.cache()
        cache.__class__ = RoutedCache
        cache.__dict__.update(routed.__dict__)
