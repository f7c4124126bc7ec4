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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mskip.compressor.cache import ExecutingRows, RoutedCache
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
from mskip.compressor.sublayers import Sublayers, as_sublayers, require_unit
from mskip.compressor.token_call import TokenCall


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
        assert isinstance(routed_layer, ExecutingRows)
        routed_layer.skip(positions)


def _some(hidden: Tensor, rows: Rows) -> Tensor:
    return hidden if rows is None else hidden.index_select(0, rows)


def _nothing(hidden: Tensor, index: int, compensation: Compensation | None) -> Tensor:
    """What a skipped attention or MLP adds to the residual stream."""
    return torch.zeros_like(hidden) if compensation is None else compensation(index, hidden)


Norm = Callable[[Tensor], Tensor]

# A layer hands its MLP and its norms the hidden state and nothing else: the pass goes round it.
_pass_of_layer: ContextVar[Pass | None] = ContextVar("pass of the layer that runs", default=None)


def _layer_forward(dense: Callable[..., Any]) -> Callable[..., Any]:
    """Of a layer whose MLP is routed, or whose routed attention has a norm after it."""

    def forward(*args: Any, routing: Pass | None = None, **kwargs: Any) -> Any:
        token = _pass_of_layer.set(routing)
        try:
            return dense(*args, **kwargs)
        finally:
            _pass_of_layer.reset(token)

    return forward


def _post_norm_forward(dense: Norm) -> Norm:
    """Of the norm after a routed sublayer, which has applied it where it was executed."""

    def forward(hidden_states: Tensor) -> Tensor:
        return dense(hidden_states) if _pass_of_layer.get() is None else hidden_states

    return forward


def _attention_forward(
    index: int,
    layer: int,
    dense: Callable[..., Any],
    post_norm: Norm | None,
    compensation: Compensation | None,
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing: Pass | None = kwargs.pop("routing", None)
        if post_norm is not None:
            routing = _pass_of_layer.get()
        if routing is None:
            return dense(hidden_states, *args, **kwargs)
        batch, positions = hidden_states.shape[:2]

        def execute(rows: Rows) -> Tensor:
            some = kwargs
            if rows is not None:
                some = {key: take_rows(value, rows, batch) for key, value in kwargs.items()}
            return run(_some(hidden_states, rows), some)

        def run(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            output: Tensor = dense(hidden, *args, **arguments)[0]
            return output if post_norm is None else post_norm(output)

        def skip(rows: Rows) -> Tensor:
            if rows is None:
                _note_skip(kwargs.get("past_key_values"), layer, positions)
            return _nothing(_some(hidden_states, rows), index, compensation)

        def skip_tokens(gate: Tensor) -> Tensor:
            return _nothing(hidden_states[gate], index, compensation)

        tokens = TokenCall(hidden_states, run, kwargs, layer, skip_tokens)
        return routing(Call(index, batch, lambda: hidden_states, execute, skip, tokens)), None

    return forward


def _mlp_forward(
    index: int,
    dense: Callable[..., Any],
    post_norm: Norm | None,
    compensation: Compensation | None,
) -> Callable[..., Any]:
    def forward(hidden_states: Tensor) -> Any:
        routing = _pass_of_layer.get()
        if routing is None:
            return dense(hidden_states)

        def execute(rows: Rows) -> Tensor:
            return run(_some(hidden_states, rows), {})

        def run(hidden: Tensor, _: dict[str, Any]) -> Tensor:
            output: Tensor = dense(hidden)
            return output if post_norm is None else post_norm(output)

        def skip(rows: Rows) -> Tensor:
            return _nothing(_some(hidden_states, rows), index, compensation)

        def skip_tokens(gate: Tensor) -> Tensor:
            return _nothing(hidden_states[gate], index, compensation)

        batch = hidden_states.shape[0]  # `len` would fix it in a trace
        tokens = TokenCall(hidden_states, run, {}, None, skip_tokens)
        return routing(Call(index, batch, lambda: hidden_states, execute, skip, tokens))

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
            return run(_some(hidden_states, rows), some)

        def run(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            output: Tensor = dense(hidden, *args, **arguments)
            return output

        def skip(rows: Rows) -> Tensor:
            if rows is None:
                _note_skip(kwargs.get("past_key_values"), layer, positions)
            hidden = _some(hidden_states, rows)
            if compensation is not None:
                hidden = hidden + compensation(index, _some(call.hidden, rows))
            return hidden

        def skip_tokens(gate: Tensor) -> Tensor:
            hidden = hidden_states[gate]
            if compensation is not None:
                hidden = hidden + compensation(index, call.hidden[gate])
            return hidden

        tokens = TokenCall(hidden_states, run, kwargs, layer, skip_tokens)
        call = Call(index, batch, lambda: norm(hidden_states), execute, skip, tokens)
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
            after = family.post_norm_of(model, layer, kind)
            dense, compensation = module.forward, sublayers.compensation
            post_norm = None if after is None else after.forward
            if kind == "attention":
                forward = _attention_forward(index, layer, dense, post_norm, compensation)
            elif kind == "mlp":
                forward = _mlp_forward(index, dense, post_norm, compensation)
            else:
                norm = family.norm_of(model, layer, kind)
                forward = _block_forward(index, layer, dense, norm, compensation)
            self._replace(module, forward)
            if kind == "mlp" or after is not None:
                self._replace(blocks[layer], _layer_forward(blocks[layer].forward))
            if after is not None:
                self._replace(after, _post_norm_forward(after.forward))

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


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name: a mask given by position is a mask all the same."""
    named = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
    return {**named, **kwargs}


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
        kwargs = by_name(module, args, kwargs)
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
