"""Proving that a row of the table of architectures is right for a model.

`prove` runs a tiny random model of the architecture and compares what routing makes of it
with what hooks of PyTorch's make of it, which know nothing of routing: they zero what a
sublayer adds, for a whole layer or for some rows. No projection is named, so that the same
suite judges any architecture. A check that compared nothing, because the decisions were all
alike or a skip did no harm, has failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ModelError
from mskip.compressor.families import FULL, SLIDING, Family, assumed, layer_types_of
from mskip.compressor.patching import by_name, patched
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, Call, ForcedPass
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers

CLOSE = 1e-4
"""Largest difference of what is computed in another order, relative to 1 + |value|."""


@dataclass(frozen=True)
class Check:
    """One thing that was put to the proof.

    Attributes:
        name: what.
        passed: whether it holds.
        detail: one sentence, with the figure; or why not.
    """

    name: str
    passed: bool
    detail: str


def prove(
    model: PreTrainedModel, family: Family, granularity: Granularity, *, seed: int = 0
) -> list[Check]:
    """Put a row to the proof on a model, which is left as it was.

    Args:
        model: tiny and random, float32, on the CPU, in evaluation mode; prompts are longer
            than its sliding window, so that should be small.
        family: the row; it is taken in place of the table's.
        granularity: what is routed.
        seed: of prompts and routers.

    Returns:
        One check for every entry of `CHECKS`; an exception of the model's code fails a check.

    Raises:
        ModelError: the row is of another architecture or does not offer the granularity, or
            the model is not one to prove a row on.
    """
    if family.model_type != model.config.model_type:
        raise ModelError(
            f"a row of '{family.model_type}' cannot be proven on a '{model.config.model_type}'."
        )
    if granularity not in family.granularities:
        raise ModelError(f"the row of '{family.model_type}' does not offer {granularity}.")
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        raise ModelError("a row is proven in float32 on the CPU, with the model in eval() mode.")
    trial = _Trial(model, family, granularity, seed)
    with assumed(family), torch.no_grad():
        return [_outcome(name, test, trial) for name, test in CHECKS.items()]


class _Failed(Exception):
    """A check that does not hold; its text says why."""


def _outcome(name: str, test: Callable[[_Trial], str], trial: _Trial) -> Check:
    try:
        return Check(name, True, test(trial))
    except _Failed as failed:
        return Check(name, False, str(failed))
    except Exception as error:  # of the model's code, which may do anything
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return Check(name, False, f"{type(error).__name__}: {reason}")


def _require(held: bool, why: str) -> None:
    if not held:
        raise _Failed(why)


def distance(value: Tensor, reference: Tensor) -> float:
    """Largest ``|value - reference| / (1 + |reference|)``; infinity where it is no number."""
    if value.shape != reference.shape:
        return math.inf
    found = float(((value - reference).abs() / (1 + reference.abs())).max())
    return math.inf if math.isnan(found) else found  # `max` would pass over a NaN


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
def _hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _zeroed(*modules: nn.Module) -> Any:
    """The modules' first outputs zeroed for the duration of the block."""

    def zero(_: Any, __: Any, ___: Any, output: Any) -> Any:
        return _with_first(output, torch.zeros_like(tensor_in(output)))

    return _hooked(dict.fromkeys(modules, zero))


@contextmanager
def _watched(**modules: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and output of each module's last call in the block, by the given names."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pair = (tensor_given(module, args, kwargs).clone(), tensor_in(output).clone())
        seen.update(dict.fromkeys(names[module], pair))

    with _hooked(dict.fromkeys(names, note)):
        yield seen


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


# -- what is run ------------------------------------------------------------------------------


class _Trial:
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
        raise _Failed("random routers take no mixed decisions, so that nothing can be compared.")

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
                return _with_first(output, torch.where(open_[:, None, None], first, instead))

            return hook

        return _hooked(
            {
                self.added(layer, self.kind): hook_of(gates[:, index])
                for index, layer in enumerate(self.layers)
            }
        )


_SKIP = ForcedPass(torch.zeros(1, 1, dtype=torch.bool))


# -- the checks -------------------------------------------------------------------------------


def _detach(trial: _Trial) -> str:
    def marks() -> dict[str, tuple[Any, ...]]:
        return {
            name: (
                each.__dict__.get("forward"),
                len(each._forward_hooks),
                len(each._forward_pre_hooks),
            )
            for name, each in trial.model.named_modules()
        }

    dense, before = trial.dense, marks()
    with trial.attached(1.1):
        changed = distance(trial.logits(trial.prompts), dense)
    _require(marks() == before, "after detaching, forwards or hooks are left in the model.")
    _require(torch.equal(trial.logits(trial.prompts), dense), "detaching changes the logits.")
    _require(changed > CLOSE, "skipping every routed sublayer does not change the logits.")
    return f"logits are bitwise what they were; skipping all had changed them by {changed:.2g}."


def _all_execute(trial: _Trial) -> str:
    with trial.attached(0.0):
        plain = trial.logits(trial.prompts)
        output = trial.model(**trial.prompts, use_cache=True)
    taken = output.past_key_values.decisions
    _require(bool((taken == EXECUTE).all()), f"of {taken.numel()} decisions some are never taken.")
    # A model may compute in another order where it fills a cache.
    cached = trial.model(**trial.prompts, use_cache=True).logits
    pairs = ((plain, trial.dense), (output.logits, cached))
    worst = max(distance(*pair) for pair in pairs)
    _require(
        all(torch.equal(*pair) for pair in pairs),
        f"logits differ from the dense model's by {worst:.2g}; they should not at all.",
    )
    return f"{taken.numel()} decisions to execute give the dense model's logits exactly."


def _skip(trial: _Trial) -> str:
    count = 0
    for number, before, run in trial.stream():
        dense = run()
        with patched(trial.model, Sublayers([number], trial.kind)):
            alone = run(_SKIP)
            with _zeroed(*trial.others(number)):
                after = run(_SKIP)
        _require(not torch.equal(alone, dense), f"in layer {number} a skip changes nothing.")
        vacuous = trial.kind != "block" and torch.equal(alone, before)
        _require(not vacuous, f"layer {number} adds nothing beside what is skipped.")
        off = distance(after, before)
        _require(
            torch.equal(after, before),
            f"with its {trial.kind} skipped and the rest zeroed, layer {number} changes the "
            f"residual stream by {off:.2g}; it should not at all.",
        )
        count += 1
    return f"in each of {count} layers a skip leaves the residual stream exactly as it is."


def _compensation(trial: _Trial) -> str:
    width = trial.model.config.hidden_size
    factor = 1.0 if trial.kind == "block" else trial.family.residual_factor_of(trial.model)
    instead = Compensation(1, width, 1)
    instead.bias.normal_(generator=torch.Generator().manual_seed(trial.seed))
    worst = 0.0
    for number, before, run in trial.stream():
        with (
            patched(trial.model, Sublayers([number], trial.kind, instead)),
            _zeroed(*trial.others(number)),
        ):
            after = run(_SKIP)
        worst = max(worst, off := distance(after, before + factor * instead.bias))
        _require(
            off <= CLOSE,
            f"in layer {number} the residual stream is {off:.2g} off what a compensated skip "
            "should make of it: a norm or a factor on the way is not in the row.",
        )
    return f"what stands in for a skipped sublayer joins the stream as it is (within {worst:.1g})."


def _nothing_else(trial: _Trial) -> str:
    factor = trial.family.residual_factor_of(trial.model)
    worst, count = 0.0, 0
    for number, before, run in trial.stream():
        parts = {kind: trial.added(number, kind) for kind in _BOTH}
        with _zeroed(*parts.values()):
            off = distance(run(), before)
        _require(
            off == 0.0,
            f"with attention and MLP zeroed, layer {number} still changes the residual stream "
            f"by {off:.2g}.",
        )
        with _watched(**parts) as seen:
            dense = run()
        sums = []
        for kind in _BOTH:
            _require(kind in seen, f"layer {number} does not run its {kind}.")
            sums.append(seen[kind][1].reshape(before.shape))
            _require(bool(sums[-1].any()), f"the {kind} of layer {number} adds nothing.")
        worst = max(worst, off := distance(dense, before + factor * sum(sums)))
        _require(
            off <= CLOSE,
            f"layer {number} gives {off:.2g} off its input plus what attention and MLP add.",
        )
        count += 1
    return f"each of {count} layers is its input plus attention plus MLP (within {worst:.1g})."


_BOTH: tuple[Granularity, Granularity] = ("attention", "mlp")


def _norms(trial: _Trial) -> str:
    """Norm and post-norm of the routed sublayer; of a block the norm before its attention."""
    kind: Granularity = "mlp" if trial.kind == "mlp" else "attention"
    family, model = trial.family, trial.model
    factor = family.residual_factor_of(model)
    count = 0
    for number, before, run in trial.stream():
        norms = {
            "norm": family.norm_of(model, number, kind),
            "post-norm": family.post_norm_of(model, number, kind),
        }
        named = {name: module for name, module in norms.items() if module is not None}
        sublayer, attention = (
            family.sublayer_of(model, number, kind),
            trial.added(number, "attention"),
        )
        with _watched(sublayer=sublayer, attention=attention, **named) as seen:
            run()
        for name in ("sublayer", "attention", *named):
            _require(name in seen, f"layer {number} does not run the {name} that the row names.")
        given, gives = seen["sublayer"]
        if "norm" in seen:
            stream, normed = seen["norm"]
            _require(
                torch.equal(normed.reshape(given.shape), given),
                f"in layer {number} the {kind} is not given what its norm gives.",
            )
            _require(not torch.equal(normed, stream), f"the norm in layer {number} does nothing.")
        else:
            stream = given
        streams = [before]
        if kind == "mlp":
            streams.append(before + factor * seen["attention"][1])
        _require(
            min(distance(stream.reshape(before.shape), each) for each in streams) <= CLOSE,
            f"in layer {number} the {kind} is not led from the residual stream by the row's norm.",
        )
        if "post-norm" in seen:
            _require(
                torch.equal(seen["post-norm"][0], gives),
                f"in layer {number} the post-norm is not given what the {kind} gives.",
            )
        count += 1 + len(named)
    return f"{count} modules are given what the row says, each in its layer."


def _decoding(trial: _Trial) -> str:
    rest, chunks = 6, [1, 1, 1, 3]
    longest = trial.longest
    batch = trial.batch([longest, longest - 3, longest, 1, 5, longest - 1], after=rest)
    _require_cache_name(trial)
    dense = trial.logits(batch)
    worst, executed = 0.0, 0.0
    for given in (None, _gates(6, len(trial.layers), trial.seed)):
        with MindSkip(trial.model, trial.routers) as skip:
            cache = skip.cache(given)
            stepwise = trial.stepwise(batch, [longest, *chunks], cache)
            assert cache.decisions is not None
            gates = cache.decisions == EXECUTE
            whole = trial.logits(batch, routing=ForcedPass(gates))
        with trial.by_hooks(gates):
            by_hooks = trial.logits(batch)
        _require(0 < float(gates.float().mean()) < 1, "the decisions are not mixed.")
        real = batch["attention_mask"].bool()
        _require(distance(by_hooks[real], dense[real]) > CLOSE, "skips do not change the logits.")
        off = max(distance(stepwise[real], other[real]) for other in (whole, by_hooks))
        if not off <= CLOSE:
            plain = trial.stepwise(batch, [longest, *chunks], None)
            own = distance(plain[real], dense[real])
            raise _Failed(
                f"prefill and decoding give logits {off:.2g} off one long forward with the same "
                f"decisions; without routing the model's own are {own:.2g} off."
            )
        worst, executed = max(worst, off), float(gates.float().mean())
    return (
        f"prompts of up to {longest} tokens and {rest} decoded ones are one long forward with "
        f"{executed:.0%} executed (within {worst:.1g})."
    )


def _gates(batch: int, routed: int, seed: int) -> Tensor:
    """Mixed decisions with a first routed sublayer that nobody executes."""
    gates = torch.rand(batch, routed, generator=torch.Generator().manual_seed(seed)) < 0.5
    gates[:, 0] = False
    gates[: batch // 2, 1:] |= ~gates[batch - batch // 2 :, 1:]
    return gates


def _require_cache_name(trial: _Trial) -> None:
    family, model = trial.family, trial.model
    handed: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            arguments = by_name(module.forward, args, kwargs)
            handed[name] = isinstance(arguments.get(family.cache), Cache)

        return hook

    hooks = {}
    for number, layer in enumerate(family.decoder_layers(model)):
        hooks[layer] = note(f"layer {number}")
        hooks[family.attention_of(model, number)] = note(f"the attention of layer {number}")
    with _hooked(hooks):
        model(**trial.prompts, use_cache=True)
    if without := [name for name, has in handed.items() if not has]:
        raise _Failed(f"{without[0]} is not handed the cache as {family.cache}.")
    _require(len(handed) == len(hooks), "the model does not run every layer and its attention.")


def _batch_invariance(trial: _Trial) -> str:
    worst = 0.0
    with MindSkip(trial.model, trial.routers):
        together = trial.model(**trial.prompts, use_cache=True)
        decisions = together.past_key_values.decisions
        distinct = len(set(map(tuple, decisions.tolist())))
        _require(distinct > 1, "all sequences decide alike.")
        for row, mask in enumerate(trial.prompts["attention_mask"].bool()):
            one = {key: value[row][mask][None] for key, value in trial.prompts.items()}
            alone = trial.model(**one, use_cache=True)
            _require(
                torch.equal(alone.past_key_values.decisions[0], decisions[row]),
                f"sequence {row} decides otherwise alone than in a batch.",
            )
            off = distance(together.logits[row, mask], alone.logits[0])
            _require(off <= CLOSE, f"logits in a left-padded batch are {off:.2g} off those alone.")
            worst = max(worst, off)
    return (
        f"{len(decisions)} left-padded sequences with {distinct} sets of decisions get what each "
        f"gets alone (within {worst:.1g})."
    )


def _split(trial: _Trial) -> str:
    count = len(trial.family.decoder_layers(trial.model))
    _require(float(trial.dense.std()) > CLOSE, "the model's logits are all the same.")
    firsts = sorted({0, 1, count - 1})
    for first in firsts:
        split = SplitModel(trial.model, first)
        found = split.logits(split.finish(split.stem(**trial.prompts)))
        off = distance(found, trial.dense)
        _require(
            torch.equal(found, trial.dense),
            f"run in two parts, cut before layer {first}, the model's logits are {off:.2g} off.",
        )
    return f"cut before layer {', '.join(map(str, firsts))}, the logits are the model's exactly."


CHECKS: dict[str, Callable[[_Trial], str]] = {
    "detaching restores the model": _detach,
    "all executed is dense": _all_execute,
    "a skip adds nothing": _skip,
    "a compensation is added as it is": _compensation,
    "attention and MLP are all": _nothing_else,
    "norms are where the row says": _norms,
    "decoding is one long forward": _decoding,
    "a batch is each alone": _batch_invariance,
    "two parts are the whole": _split,
}
"""The checks by name, each of which gives its sentence or raises."""
