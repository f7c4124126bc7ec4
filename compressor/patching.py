"""Placing the skip in a Hugging Face model, and taking it out again.

`patched` replaces the ``forward`` of the routed modules so that a *pass* decides
what runs: the one that the model's call is given in the keyword argument
``routing``, or that `passing` puts in force. Without a pass the model is dense.
Everything is restored exactly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from mskip.compressor.cache import ExecutingRows
from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ModelError
from mskip.compressor.families import Family, family_of
from mskip.compressor.routing import Call, Pass, Rows
from mskip.compressor.sublayers import Sublayers, as_sublayers
from mskip.compressor.token_call import TokenCall

Forward = TypeVar("Forward", bound=Callable[..., Any])

# Not an argument from layer to layer: some architectures hand their layers, or these their
# attention, no keyword argument that they do not know, and none does so with MLPs and norms.
_in_force: ContextVar[Pass | None] = ContextVar("pass in force", default=None)


@contextmanager
def passing(routing: Pass | None) -> Iterator[None]:
    """Put a pass in force for calls of patched modules in the block; None runs them dense."""
    token = _in_force.set(routing)
    try:
        yield
    finally:
        _in_force.reset(token)


def by_name(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call by name: a mask given by position is a mask all the same."""
    return {**dict(zip(_parameters(forward), args, strict=False)), **kwargs} if args else kwargs


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    while not inspect.ismethod(forward) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__  # what a patch replaced
    if inspect.ismethod(forward):
        return _parameters_of(forward.__func__)[1:]
    return _parameters_of(forward)


@functools.lru_cache(maxsize=1024)  # of functions: a bound method would keep its model alive
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


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


class _Routed:
    """The forward of a routed module: dense without a pass, else what the pass makes of it.

    Args:
        family: of the model.
        model: the model.
        sublayers: what is routed.
        index: of this one among them.
    """

    def __init__(
        self, family: Family, model: PreTrainedModel, sublayers: Sublayers, index: int
    ) -> None:
        kind = sublayers.granularity
        self.family, self.kind, self.index = family, kind, index
        self.layer = sublayers.layers[index]
        self.compensation: Compensation | None = sublayers.compensation
        self.dense = family.sublayer_of(model, self.layer, kind).forward
        self.norm = family.norm_of(model, self.layer, kind)
        after = family.post_norm_of(model, self.layer, kind)
        self.post_norm = None if after is None else after.forward
        # A layer's attention gives its weights too; so does a whole layer, here and there.
        self.gives_tuple = kind == "attention" or (kind == "block" and family.layer_gives_tuple)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        routing = _in_force.get()
        if routing is None:
            return self.dense(*args, **kwargs)
        arguments = dict(by_name(self.dense, args, kwargs))
        hidden = arguments.pop(_parameters(self.dense)[0])
        output = routing(self._call(hidden, arguments))
        return (output, None) if self.gives_tuple else output

    def _call(self, hidden: Tensor, arguments: dict[str, Any]) -> Call:
        batch, positions = hidden.shape[:2]  # `len` would fix it in a trace

        def execute(rows: Rows) -> Tensor:
            if rows is None:
                return self._run(hidden, arguments)
            some = {key: take_rows(value, rows, batch) for key, value in arguments.items()}
            return self._run(hidden.index_select(0, rows), some)

        @functools.cache  # the router asks for it, and what stands in for a skip
        def normed() -> Tensor:
            if self.kind != "block" or self.norm is None:
                return hidden
            seen: Tensor = self.norm(hidden)
            return seen

        # Nothing here may know the call: the cycle would keep this call's cache, and in training
        # its whole graph, until the collector looks.
        def skip(rows: Rows) -> Tensor:
            if rows is None and self.kind != "mlp":
                self._note_skip(arguments, positions)
            return self._skipped(
                hidden, normed, lambda x: x if rows is None else x.index_select(0, rows)
            )

        def skip_tokens(gate: Tensor) -> Tensor:
            return self._skipped(hidden, normed, lambda x: x[gate])

        layer = None if self.kind == "mlp" else self.layer
        tokens = TokenCall(hidden, self._run, arguments, layer, skip_tokens, self.family.cache)
        return Call(self.index, batch, normed, execute, skip, tokens)

    def _run(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        # An MLP's arguments are none: its layer hands it the hidden state alone.
        output: Any = self.dense(hidden, **arguments)
        if self.gives_tuple:
            output = output[0]
        if self.post_norm is not None:
            output = self.post_norm(output)
        added: Tensor = output
        return added

    def _skipped(
        self, hidden: Tensor, normed: Callable[[], Tensor], some: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What a skip gives to some rows or tokens: of a block the new residual stream."""
        kept = some(hidden)
        if self.compensation is None:
            return kept if self.kind == "block" else torch.zeros_like(kept)
        instead: Tensor = self.compensation(self.index, some(normed()))
        return kept + instead if self.kind == "block" else instead

    def _note_skip(self, arguments: dict[str, Any], positions: int) -> None:
        """Tell a routed layer's cache that nobody executed these positions."""
        cache = arguments.get(self.family.cache)
        if cache is not None:
            routed_layer = cache.layers[self.layer]
            assert isinstance(routed_layer, ExecutingRows)
            routed_layer.skip(positions)


def _post_norm_forward(dense: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of the norm after a routed sublayer, which has applied it where it was executed."""

    def forward(hidden_states: Tensor) -> Tensor:
        return dense(hidden_states) if _in_force.get() is None else hidden_states

    return forward


def _model_forward(dense: Callable[..., Any]) -> Callable[..., Any]:
    """Of the model: takes the pass for itself, since not every architecture hands it on."""

    def forward(*args: Any, routing: Pass | None = None, **kwargs: Any) -> Any:
        with passing(routing):
            return dense(*args, **kwargs)

    return forward


class Patch:
    """The routed layers of a model, patched; `restore` takes the patch out.

    Args:
        model: a supported causal LM.
        sublayers: what is routed; a bare list of layers means their attention.

    Raises:
        ModelError: unsupported architecture or granularity, a layer out of range, or a
            model that is patched already.
    """

    def __init__(self, model: PreTrainedModel, sublayers: Sublayers | list[int]) -> None:
        family = family_of(model)
        count = len(family.decoder_layers(model))
        sublayers = as_sublayers(sublayers)
        layers, kind = sublayers.layers, sublayers.granularity
        if kind not in family.granularities:
            raise ModelError(
                f"'{family.model_type}' models can be routed by "
                f"{' or '.join(sorted(family.granularities))}, not by {kind}.",
                f"Set routing.granularity to {min(family.granularities)}.",
            )
        if bad := [layer for layer in layers if not 0 <= layer < count]:
            raise ModelError(f"layers {bad} do not exist: the model has layers 0..{count - 1}.")
        if len(set(layers)) < len(layers):
            raise ModelError(f"layers {layers} name a layer twice.")
        # A second pass would be handed to the first one's layers too.
        if _is_patched(model):
            raise ModelError("this model has routers attached already; detach them first.")
        self._saved: list[tuple[nn.Module, Any]] = []
        routed = [_Routed(family, model, sublayers, index) for index in range(len(layers))]
        for layer, forward in zip(layers, routed, strict=True):
            self._replace(family.sublayer_of(model, layer, kind), forward)
            after = family.post_norm_of(model, layer, kind)
            if after is not None:
                self._replace(after, _post_norm_forward(after.forward))
        self._replace(model, _model_forward(model.forward))

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._saved.append((module, module.__dict__.get("forward")))
        # transformers looks at what a forward takes; `wraps` would rename its module too.
        functools.update_wrapper(forward, module.forward, assigned=("__doc__",))
        module.forward = forward

    def restore(self) -> None:
        """Put every ``forward`` back as it was."""
        for module, previous in reversed(self._saved):
            if previous is None:
                del module.forward
            else:
                module.forward = previous
        self._saved.clear()


def _is_patched(model: nn.Module) -> bool:
    return getattr(model.__dict__.get("forward"), "__module__", None) == __name__


@contextmanager
def patched(model: PreTrainedModel, sublayers: Sublayers | list[int]) -> Iterator[None]:
    """Patch the routed sublayers for the duration of the block."""
    patch = Patch(model, sublayers)
    try:
        yield
    finally:
        patch.restore()
