"""What a row is proven with: prompts, routers, and hooks that know nothing of routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mskip.compressor.errors import ModelError
from mskip.compressor.families import FULL, SLIDING, Family, layer_types_of
from mskip.compressor.patching import by_name, patched
from mskip.compressor.router import Routers
from mskip.compressor.routing import Call
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers

CLOSE = 1e-4
"""Largest difference of what is computed in another order, relative to 1 + |value|."""


class Failed(Exception):
    """A check that does not hold; its text says why."""


def require(held: bool, why: str) -> None:
    if not held:
        raise Failed(why)


def distance(value: Tensor, reference: Tensor) -> float:
    """Largest ``|value - reference| / (1 + |reference|)``; infinity where it is no number."""
    if value.shape != reference.shape:
        return math.inf
    found = float(((value - reference).abs() / (1 + reference.abs())).max())
    return math.inf if math.isnan(found) else found  # `max` would pass over a NaN


def reason_of(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (
        text[0]
        if text and isinstance(error, ModelError)
        else ": ".join([type(error).__name__, *text[:1]])
    )


def tensor_in(output: Any) -> Tensor:
    """The tensor that a module returned, alone or first in a tuple."""
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    return first


def tensor_given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among a call's arguments, ``hidden_states`` before others."""
    named = by_name(module.forward, args, kwargs)
    if isinstance(hidden := named.get("hidden_states"), Tensor):
        return hidden
    return next(value for value in named.values() if isinstance(value, Tensor))


# -- hooks ------------------------------------------------------------------------------------


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def zeroed(*modules: nn.Module) -> Any:
    """The modules' first outputs zeroed for the duration of the block."""

    def zero(_: Any, __: Any, ___: Any, output: Any) -> Any:
        return with_first(output, torch.zeros_like(tensor_in(output)))

    return hooked(dict.fromkeys(modules, zero))


@contextmanager
def watched(**modules: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and output of each module's last call in the block, by the given names."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pair = (tensor_given(module, args, kwargs).clone(), tensor_in(output).clone())
        seen.update(dict.fromkeys(names[module], pair))

    with hooked(dict.fromkeys(names, note)):
        yield seen


def with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


# -- what is run ------------------------------------------------------------------------------


class Trial:
    """A model with a row, and what all checks run on; made when first asked for."""

    def __init__(
        self, model: PreTrainedModel, family: Family, kind: Granularity, seed: int
    ) -> None:
        self.model, self.family, self.kind, self.seed = model, family, kind, seed

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompts: more than a sliding layer sees."""
        slides = SLIDING in layer_types_of(self.model.config)
        return max(9, self.model.config.sliding_window + 5 if slides else 0)

    @cached_property
    def layers(self) -> list[int]:
        """The routed layers: all but one whose kind another one has too."""
        count = len(self.family.decoder_layers(self.model))
        kinds = (getattr(self.model.config, "layer_types", None) or [FULL] * count)[:count]
        spare = next((i for i in range(1, len(kinds)) if kinds.count(kinds[i]) > 1), None)
        return [layer for layer in range(count) if layer != spare]

    @cached_property
    def sublayers(self) -> Sublayers:
        return Sublayers(self.layers, self.kind)

    def batch(self, lengths: list[int], after: int = 0) -> dict[str, Tensor]:
        """Left-padded random prompts, followed by ``after`` tokens of each sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        width = max(lengths) + after
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(3, vocabulary, (len(lengths), width), generator=generator)
        ends = torch.arange(width)[None] - (max(lengths) - torch.tensor(lengths))[:, None]
        mask = (ends >= 0).long()
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "position_ids": ends.clamp(min=0),
        }

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        longest = self.longest
        return self.batch([longest, 4, longest - 2, 1, 6, longest, 3, longest - 1])

    def logits(self, batch: dict[str, Tensor], **more: Any) -> Tensor:
        """Of a call without a cache."""
        found: Tensor = self.model(**batch, use_cache=False, **more).logits
        return found

    @cached_property
    def dense(self) -> Tensor:
        return self.logits(self.prompts)

    def stepwise(self, batch: dict[str, Tensor], chunks: list[int], cache: Cache | None) -> Tensor:
        """Logits of a batch that is given in chunks, with a cache from the first one on."""
        parts, end = [], 0
        for size in chunks:
            start, end = end, end + size
            # Masks reach back to the beginning; the other inputs are the chunk's own.
            call = {key: value[:, start:end] for key, value in batch.items()}
            call["attention_mask"] = batch["attention_mask"][:, :end]
            output = self.model(**call, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        return torch.cat(parts, dim=1)

    def attached(self, tau: float) -> MindSkip:
        """Routers that know nothing: they execute all at ``tau`` 0, skip all at 1.1."""
        return MindSkip(self.model, Routers(self.sublayers, self.model.config.hidden_size), tau)

    @cached_property
    def routers(self) -> Routers:
        """Random routers that decide differently for the prompts, and not by a hair."""
        prompts = self.prompts["attention_mask"].bool()
        means: dict[int, Tensor] = {}

        def record(call: Call) -> Tensor:
            means[call.index] = (call.hidden * prompts[..., None]).sum(1) / prompts.sum(1)[:, None]
            return call.execute(None)

        with patched(self.model, self.sublayers):
            self.logits(self.prompts, routing=record)
        inputs = torch.stack([means[index] for index in range(len(self.layers))], dim=1)
        for seed in range(self.seed, self.seed + 16):
            routers = Routers(self.sublayers, self.model.config.hidden_size)
            routers.standardise(inputs)
            routers.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(seed))
            with MindSkip(self.model, routers):
                cache = self.model(**self.prompts, use_cache=True).past_key_values
            distinct = len(set(map(tuple, cache.decisions.tolist())))
            if distinct >= 3 and float((cache.scores - 0.5).abs().min()) > 1e-3:
                return routers
        raise Failed("random routers take no mixed decisions, so that nothing can be compared.")

    def stream(self) -> Iterator[tuple[int, Tensor, Callable[..., Tensor]]]:
        """Every layer: number, the residual stream before it, and ``run(routing=None)``."""
        split = SplitModel(self.model, 0)
        stem = split.stem(**self.prompts)
        hidden = stem.hidden
        for number, layer in split.upper:
            arguments = stem.arguments[number]

            def run(
                routing: Any = None,
                layer: nn.Module = layer,
                arguments: dict[str, Any] = arguments,
                before: Tensor = hidden,
            ) -> Tensor:
                return split.run(layer, arguments, routing, before)

            yield number, hidden, run
            hidden = run()

    def added(self, layer: int, kind: Granularity) -> nn.Module:
        """The module whose output joins the residual stream."""
        after = self.family.post_norm_of(self.model, layer, kind)
        return after or self.family.sublayer_of(self.model, layer, kind)

    def others(self, layer: int) -> list[nn.Module]:
        """What adds to the stream in a layer beside the routed sublayer."""
        kinds: dict[Granularity, list[Granularity]] = {"attention": ["mlp"], "mlp": ["attention"]}
        return [self.added(layer, other) for other in kinds.get(self.kind, [])]

    def by_hooks(self, gates: Tensor) -> Any:
        """Skips by hooks, in a model that is not patched; ``gates`` is [batch, routed] bool."""

        def hook_of(open_: Tensor) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                first = tensor_in(output)
                given = tensor_given(module, args, kwargs)
                instead = given if self.kind == "block" else torch.zeros_like(first)
                return with_first(output, torch.where(open_[:, None, None], first, instead))

            return hook

        return hooked(
            {
                self.added(layer, self.kind): hook_of(gates[:, index])
                for index, layer in enumerate(self.layers)
            }
        )
