"""Proving that a row of the table of architectures is right for a model.

`prove` runs a tiny random model of the architecture and compares what routing makes of it
with what hooks of PyTorch's make of it, which know nothing of routing: they zero what a
sublayer adds, for a whole layer or for some rows. No projection is named, so that the same
suite judges any architecture. A check that compared nothing, because the decisions were all
alike or a skip did no harm, has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ModelError
from mskip.compressor.families import Family, assumed
from mskip.compressor.patching import by_name, patched
from mskip.compressor.routing import EXECUTE, ForcedPass
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers
from mskip.compressor.trial import (
    CLOSE,
    Failed,
    Trial,
    distance,
    hooked,
    require,
    watched,
    zeroed,
)


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
    trial = Trial(model, family, granularity, seed)
    with assumed(family), torch.no_grad():
        return [_outcome(name, test, trial) for name, test in CHECKS.items()]


def _outcome(name: str, test: Callable[[Trial], str], trial: Trial) -> Check:
    try:
        return Check(name, True, test(trial))
    except Failed as failed:
        return Check(name, False, str(failed))
    except Exception as error:  # of the model's code, which may do anything
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return Check(name, False, f"{type(error).__name__}: {reason}")


_SKIP = ForcedPass(torch.zeros(1, 1, dtype=torch.bool))


# -- the checks -------------------------------------------------------------------------------


def _detach(trial: Trial) -> str:
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
    require(marks() == before, "after detaching, forwards or hooks are left in the model.")
    require(torch.equal(trial.logits(trial.prompts), dense), "detaching changes the logits.")
    require(changed > CLOSE, "skipping every routed sublayer does not change the logits.")
    return f"logits are bitwise what they were; skipping all had changed them by {changed:.2g}."


def _all_execute(trial: Trial) -> str:
    with trial.attached(0.0):
        plain = trial.logits(trial.prompts)
        output = trial.model(**trial.prompts, use_cache=True)
    taken = output.past_key_values.decisions
    require(bool((taken == EXECUTE).all()), f"of {taken.numel()} decisions some are never taken.")
    # A model may compute in another order where it fills a cache.
    cached = trial.model(**trial.prompts, use_cache=True).logits
    pairs = ((plain, trial.dense), (output.logits, cached))
    worst = max(distance(*pair) for pair in pairs)
    require(
        all(torch.equal(*pair) for pair in pairs),
        f"logits differ from the dense model's by {worst:.2g}; they should not at all.",
    )
    return f"{taken.numel()} decisions to execute give the dense model's logits exactly."


def _skip(trial: Trial) -> str:
    count = 0
    for number, before, run in trial.stream():
        dense = run()
        with patched(trial.model, Sublayers([number], trial.kind)):
            alone = run(_SKIP)
            with zeroed(*trial.others(number)):
                after = run(_SKIP)
        require(not torch.equal(alone, dense), f"in layer {number} a skip changes nothing.")
        vacuous = trial.kind != "block" and torch.equal(alone, before)
        require(not vacuous, f"layer {number} adds nothing beside what is skipped.")
        off = distance(after, before)
        require(
            torch.equal(after, before),
            f"with its {trial.kind} skipped and the rest zeroed, layer {number} changes the "
            f"residual stream by {off:.2g}; it should not at all.",
        )
        count += 1
    return f"in each of {count} layers a skip leaves the residual stream exactly as it is."


def _compensation(trial: Trial) -> str:
    width = trial.model.config.hidden_size
    factor = 1.0 if trial.kind == "block" else trial.family.residual_factor_of(trial.model)
    instead = Compensation(1, width, 1)
    instead.bias.normal_(generator=torch.Generator().manual_seed(trial.seed))
    worst = 0.0
    for number, before, run in trial.stream():
        with (
            patched(trial.model, Sublayers([number], trial.kind, instead)),
            zeroed(*trial.others(number)),
        ):
            after = run(_SKIP)
        worst = max(worst, off := distance(after, before + factor * instead.bias))
        require(
            off <= CLOSE,
            f"in layer {number} the residual stream is {off:.2g} off what a compensated skip "
            "should make of it: a norm or a factor on the way is not in the row.",
        )
    return f"what stands in for a skipped sublayer joins the stream as it is (within {worst:.1g})."


def _nothing_else(trial: Trial) -> str:
    factor = trial.family.residual_factor_of(trial.model)
    worst, count = 0.0, 0
    for number, before, run in trial.stream():
        parts = {kind: trial.added(number, kind) for kind in _BOTH}
        with zeroed(*parts.values()):
            off = distance(run(), before)
        require(
            off == 0.0,
            f"with attention and MLP zeroed, layer {number} still changes the residual stream "
            f"by {off:.2g}.",
        )
        with watched(**parts) as seen:
            dense = run()
        sums = []
        for kind in _BOTH:
            require(kind in seen, f"layer {number} does not run its {kind}.")
            sums.append(seen[kind][1].reshape(before.shape))
            require(bool(sums[-1].any()), f"the {kind} of layer {number} adds nothing.")
        worst = max(worst, off := distance(dense, before + factor * sum(sums)))
        require(
            off <= CLOSE,
            f"layer {number} gives {off:.2g} off its input plus what attention and MLP add.",
        )
        count += 1
    return f"each of {count} layers is its input plus attention plus MLP (within {worst:.1g})."


_BOTH: tuple[Granularity, Granularity] = ("attention", "mlp")


def _norms(trial: Trial) -> str:
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
        with watched(sublayer=sublayer, attention=attention, **named) as seen:
            run()
        for name in ("sublayer", "attention", *named):
            require(name in seen, f"layer {number} does not run the {name} that the row names.")
        given, gives = seen["sublayer"]
        if "norm" in seen:
            stream, normed = seen["norm"]
            require(
                torch.equal(normed.reshape(given.shape), given),
                f"in layer {number} the {kind} is not given what its norm gives.",
            )
            require(not torch.equal(normed, stream), f"the norm in layer {number} does nothing.")
        else:
            stream = given
        streams = [before]
        if kind == "mlp":
            streams.append(before + factor * seen["attention"][1])
        require(
            min(distance(stream.reshape(before.shape), each) for each in streams) <= CLOSE,
            f"in layer {number} the {kind} is not led from the residual stream by the row's norm.",
        )
        if "post-norm" in seen:
            require(
                torch.equal(seen["post-norm"][0], gives),
                f"in layer {number} the post-norm is not given what the {kind} gives.",
            )
        count += 1 + len(named)
    return f"{count} modules are given what the row says, each in its layer."


def _decoding(trial: Trial) -> str:
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
        require(0 < float(gates.float().mean()) < 1, "the decisions are not mixed.")
        real = batch["attention_mask"].bool()
        require(distance(by_hooks[real], dense[real]) > CLOSE, "skips do not change the logits.")
        off = max(distance(stepwise[real], other[real]) for other in (whole, by_hooks))
        if not off <= CLOSE:
            plain = trial.stepwise(batch, [longest, *chunks], None)
            own = distance(plain[real], dense[real])
            raise Failed(
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


def _require_cache_name(trial: Trial) -> None:
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
    with hooked(hooks):
        model(**trial.prompts, use_cache=True)
    if without := [name for name, has in handed.items() if not has]:
        raise Failed(f"{without[0]} is not handed the cache as {family.cache}.")
    require(len(handed) == len(hooks), "the model does not run every layer and its attention.")


def _batch_invariance(trial: Trial) -> str:
    worst = 0.0
    with MindSkip(trial.model, trial.routers):
        together = trial.model(**trial.prompts, use_cache=True)
        decisions = together.past_key_values.decisions
        distinct = len(set(map(tuple, decisions.tolist())))
        require(distinct > 1, "all sequences decide alike.")
        for row, mask in enumerate(trial.prompts["attention_mask"].bool()):
            one = {key: value[row][mask][None] for key, value in trial.prompts.items()}
            alone = trial.model(**one, use_cache=True)
            require(
                torch.equal(alone.past_key_values.decisions[0], decisions[row]),
                f"sequence {row} decides otherwise alone than in a batch.",
            )
            off = distance(together.logits[row, mask], alone.logits[0])
            require(off <= CLOSE, f"logits in a left-padded batch are {off:.2g} off those alone.")
            worst = max(worst, off)
    return (
        f"{len(decisions)} left-padded sequences with {distinct} sets of decisions get what each "
        f"gets alone (within {worst:.1g})."
    )


def _split(trial: Trial) -> str:
    count = len(trial.family.decoder_layers(trial.model))
    require(float(trial.dense.std()) > CLOSE, "the model's logits are all the same.")
    firsts = sorted({0, 1, count - 1})
    for first in firsts:
        split = SplitModel(trial.model, first)
        found = split.logits(split.finish(split.stem(**trial.prompts)))
        off = distance(found, trial.dense)
        require(
            torch.equal(found, trial.dense),
            f"run in two parts, cut before layer {first}, the model's logits are {off:.2g} off.",
        )
    return f"cut before layer {', '.join(map(str, firsts))}, the logits are the model's exactly."


CHECKS: dict[str, Callable[[Trial], str]] = {
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
