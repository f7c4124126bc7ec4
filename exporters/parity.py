"""Does the engine compute what PyTorch computes? Each question apart, each with a gate.

Decisions and arithmetic are never mixed into one number: decisions are compared
as they fall, logits with the decisions forced equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mskip.compressor.artifact import Run, load_routers, routers_hash, routing_unit
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import ArtifactError
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import RoundedLimits, ValidationSpec
from mskip.compressor.samples import calibrated_samples
from mskip.compressor.sublayers import require_unit
from mskip.exporters.contract import Contract
from mskip.exporters.laziness import built_laziness, measure_laziness
from mskip.exporters.opening import open_runner
from mskip.exporters.runner import Floats, Ints, Runner, State, left_padded
from mskip.exporters.targets import PORTABLE, Form
from mskip.exporters.torch_runner import TorchRunner
from mskip.exporters.trt_runner import open_engine

BATCH = 8
LARGEST = float(np.finfo(np.float32).max)
"""Stands for NaN and infinity, which would pass a ``max`` unseen and have no JSON."""


def batch_of(engine: Runner) -> int:
    """Prompts that are compared at once."""
    return min(BATCH, engine.largest_batch or BATCH)


@dataclass(frozen=True)
class Gate:
    """One requirement.

    Attributes:
        name: what is measured.
        value: what was found; None where it was not measured.
        limit: what is asked for.
        comparison: ">=" or "<=": how the value must stand to the limit.
        passed: whether it does; None where it was not measured.
    """

    name: str
    value: float | None
    limit: float
    comparison: str
    passed: bool | None


def at_least(name: str, value: float, limit: float) -> Gate:
    """A gate that wants ``value >= limit``."""
    return Gate(name, value, limit, ">=", value >= limit)


def at_most(name: str, value: float, limit: float) -> Gate:
    """A gate that wants ``value <= limit``."""
    return Gate(name, value, limit, "<=", value <= limit)


def finite(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """``values`` with `LARGEST` for NaN and infinity."""
    return np.nan_to_num(values, nan=LARGEST, posinf=LARGEST)


@dataclass
class Comparison:
    """What was found over all prompts.

    Attributes:
        calls: decisions compared.
        flips: decisions that differ, each with prompt, layer, both scores and the margin.
        min_margin: smallest |score - tau| of the reference.
        max_abs: largest absolute difference of logits, decisions forced equal.
        max_rel: the same relative to the largest logit of its position.
        kl: sum over positions of KL(reference || engine) of the next token, nats, decisions
            forced equal.
        next_matching: positions where both find the same token likeliest.
        positions: positions compared.
        matching: prompts whose greedy tokens are all equal.
        prompts: prompts compared.
    """

    calls: int = 0
    flips: list[dict[str, float]] = field(default_factory=list)
    min_margin: float = float("inf")
    max_abs: float = 0.0
    max_rel: float = 0.0
    kl: float = 0.0
    next_matching: int = 0
    positions: int = 0
    matching: int = 0
    prompts: int = 0

    @property
    def agreement(self) -> float:
        """Share of equal decisions."""
        return 1.0 - len(self.flips) / self.calls if self.calls else 1.0

    def decisions(self, expected: State, found: State, tau: Floats, layers: list[int]) -> None:
        """Compare decisions of one batch."""
        margins = np.abs(expected.scores - tau)
        self.min_margin = min(self.min_margin, float(margins.min(initial=np.inf)))
        self.calls += expected.routing.size
        for row, index in np.argwhere(expected.routing != found.routing):
            self.flips.append(
                {
                    "prompt": self.prompts + int(row),
                    "layer": layers[index],
                    "torch": float(expected.scores[row, index]),
                    "engine": float(finite(found.scores[row, index])),
                    "margin": float(margins[row, index]),
                }
            )

    def logits(self, expected: Floats, found: Floats, mask: Ints) -> None:
        """Compare logits [batch, sequence, vocabulary] where ``mask`` is 1."""
        real = mask.astype(bool)
        expected, found = expected[real], found[real]
        difference = np.abs(expected - found).max(axis=-1)
        scale = np.abs(expected).max(axis=-1)
        for one, other in zip(expected, found, strict=True):  # one vocabulary at a time
            right, made = _log_probs(one), _log_probs(other)
            self.kl += float(finite((np.exp(right) * (right - made)).sum()))
        self.next_matching += int((expected.argmax(-1) == found.argmax(-1)).sum())
        self.positions += len(expected)
        self.max_abs = max(self.max_abs, float(finite(difference).max()))
        self.max_rel = max(self.max_rel, float(finite(difference / scale).max()))


def compare(
    reference: Runner, engine: Runner, prompts: Sequence[Sequence[int]], steps: int,
    progress: Progress = silent,
) -> Comparison:  # fmt: skip
    """Compare two runners on prompts and a greedy continuation.

    Both engines read the reference's tokens. As long as an engine's own choice
    equals the reference's at every step, its free-running greedy output is that
    same text, so one run answers both questions.

    Args:
        reference: what is right.
        engine: what is in question.
        prompts: token ids.
        steps: tokens to continue.
        progress: one unit a prompt.
    """
    result, most = Comparison(), batch_of(engine)
    tau = np.asarray(reference.contract.tau, dtype=np.float32)
    layers = reference.contract.routed_layers
    for start in range(0, len(prompts), most):
        ids, mask = left_padded(prompts[start : start + most], reference.contract.pad)
        expected, found = reference.prefill(ids, mask), engine.prefill(ids, mask)
        result.decisions(expected, found, tau, layers)
        same = (expected.routing == found.routing).all(axis=1)
        if not same.all():
            found = engine.prefill(ids, mask, routing=expected.routing)
        result.logits(expected.logits, found.logits, mask)
        for step in range(steps):
            chosen = expected.logits[:, -1].argmax(-1)
            same &= chosen == found.logits[:, -1].argmax(-1)
            if step == steps - 1:
                break
            tokens = chosen[:, None].astype(np.int64)
            expected, found = reference.extend(expected, tokens), engine.extend(found, tokens)
            result.logits(expected.logits, found.logits, np.ones_like(tokens))
        result.matching += int(same.sum())
        result.prompts += len(ids)
        progress("compare engines", result.prompts, len(prompts))
    return result


def batch_invariance(
    engine: Runner, prompts: Sequence[Sequence[int]], progress: Progress = silent
) -> dict[str, Any]:
    """Each prompt alone against the same prompt in a batch with padding.

    Returns:
        ``max_abs``: largest difference of the last position's logits.
        ``decisions_equal``: whether every decision is the same.
    """
    worst, equal, most = 0.0, True, batch_of(engine)
    for start in range(0, len(prompts), most):
        chosen = prompts[start : start + most]
        ids, mask = left_padded(chosen, engine.contract.pad)
        together = engine.prefill(ids, mask)
        for row, prompt in enumerate(chosen):
            alone = engine.prefill(np.asarray([prompt], dtype=np.int64))
            equal &= bool((alone.routing[0] == together.routing[row]).all())
            difference = np.abs(alone.logits[0, -1] - together.logits[row, -1]).max()
            worst = max(worst, float(finite(difference)))
            progress("batch invariance", start + row + 1, len(prompts))
    return {"max_abs": worst, "decisions_equal": equal}


def quality(
    reference: Runner, engine: Runner, samples: Sequence[Sample], progress: Progress = silent
) -> dict[str, float]:
    """KL to the dense model and perplexity on answers, by both engines.

    The prompt is prefilled and the answer read as a further chunk, as in
    log-likelihood scoring: the decisions see the prompt alone.

    Args:
        reference: PyTorch; also runs the dense model (every decision forced to execute).
        engine: what is in question.
        samples: with answers.
        progress: one unit a sample.
    """
    sums = {"kl_torch": 0.0, "kl_engine": 0.0, "loss_torch": 0.0, "loss_engine": 0.0}
    tokens, most = 0, batch_of(engine)
    routed = len(reference.contract.routed_layers)
    for start in range(0, len(samples), most):
        chosen = samples[start : start + most]
        everything = np.ones((len(chosen), routed), dtype=np.int64)
        dense, targets = _answer_log_probs(reference, chosen, everything)
        for name, runner in (("torch", reference), ("engine", engine)):
            found, _ = _answer_log_probs(runner, chosen, None)
            sums[f"kl_{name}"] += float((np.exp(dense) * (dense - found)).sum())
            picked = np.take_along_axis(found, targets[:, None], axis=1)
            sums[f"loss_{name}"] += -float(picked.sum())
        tokens += len(targets)
        progress("quality by engine", start + len(chosen), len(samples))
    return {
        "tokens": tokens,
        "kl_torch": float(finite(sums["kl_torch"] / tokens)),
        "kl_engine": float(finite(sums["kl_engine"] / tokens)),
        "perplexity_torch": float(finite(np.exp(sums["loss_torch"] / tokens))),
        "perplexity_engine": float(finite(np.exp(sums["loss_engine"] / tokens))),
    }


def _answer_log_probs(
    runner: Runner, samples: Sequence[Sample], routing: Ints | None
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Log probabilities at the answers, [tokens, vocabulary], and the answer tokens, [tokens]."""
    ids, mask = left_padded([s.input_ids[: s.prompt_length] for s in samples], runner.contract.pad)
    answers = [s.input_ids[s.prompt_length :] for s in samples]
    width = max(len(answer) for answer in answers)
    chunk = np.full((len(samples), width), runner.contract.pad, dtype=np.int64)
    chunk_mask = np.zeros_like(chunk)
    for row, answer in enumerate(answers):
        chunk[row, : len(answer)] = answer
        chunk_mask[row, : len(answer)] = 1
    state = runner.prefill(ids, mask, routing=routing)
    following = runner.extend(state, chunk, chunk_mask)
    logits = np.concatenate([state.logits[:, -1:], following.logits[:, :-1]], axis=1)
    real = chunk_mask.astype(bool)
    return _log_probs(logits[real]), chunk[real]


def _log_probs(logits: Floats) -> npt.NDArray[np.float64]:
    scored = logits.astype(np.float64)
    scored -= scored.max(axis=-1, keepdims=True)
    scored -= np.log(np.exp(scored).sum(axis=-1, keepdims=True))
    return scored


def gates_of(report: dict[str, Any], spec: ValidationSpec) -> list[Gate]:
    """The gates of a validation report.

    Fewer bits change every logit and some tokens, so distributions are compared in their place;
    what does not depend on numbers is held to the same limits.
    """
    invariance, lazy, measured = report["batch_invariance"], report["laziness"], report["quality"]
    # What does its work in operators of ours is lazy as a plugin only, not as their functions.
    nodes, ratio = (lazy["skipped_branch_nodes"], lazy["ratio"]) if lazy else (0, 0.0)
    difference = abs(measured["kl_engine"] - measured["kl_torch"])
    agreement, limits = report["decisions"]["agreement"], spec.limits
    if report["rounded"] is None:
        numbers = [
            at_least("decision agreement", agreement, limits.decision_agreement),
            at_most("logits max abs", report["logits"]["max_abs"], limits.logits_max_abs),
            at_most("logits max rel", report["logits"]["max_rel"], limits.logits_max_rel),
            at_least("greedy token match", report["tokens"]["match"], limits.token_match),
        ]
        most, batched = limits.quality_difference, limits.batch_invariance_max_abs
    else:
        rounded: RoundedLimits = getattr(spec, report["rounded"])
        numbers = [
            at_least("decision agreement", agreement, rounded.decision_agreement),
            at_most("KL to PyTorch", report["logits"]["kl"], rounded.kl),
            at_least("next token match", report["tokens"]["next_match"], rounded.next_token_match),
        ]
        most, batched = rounded.quality_difference, rounded.batch_invariance_max_abs
    lazily = [
        at_most("nodes run in skipped branches", nodes, limits.skipped_branch_nodes),
        at_least("execute / skip time", ratio, limits.laziness_ratio),
    ]
    if lazy is None:
        lazily = [replace(gate, value=None, passed=None) for gate in lazily]
    return [
        *numbers,
        *lazily,
        at_most("batch invariance max abs", invariance["max_abs"], batched),
        at_least("batch invariance decisions", float(invariance["decisions_equal"]), 1.0),
        at_most("KL engine - KL PyTorch", difference, most),
    ]


def _rounded(contract: Contract, base: BaseModel) -> str | None:
    """Which limits of fewer bits an engine is held to; None where it has the model's."""
    if contract.weights != "float":
        return contract.weights
    return (
        None if contract.dtype == str(base.model.dtype).removeprefix("torch.") else contract.dtype
    )


def validate_run(
    run: Run,
    base: BaseModel,
    progress: Progress = silent,
    form: Form = PORTABLE,
    *,
    built: bool = False,
) -> dict[str, Any]:
    """Compare an exported run with PyTorch and judge it by the recipe's limits.

    Args:
        run: an exported run.
        base: its base model.
        progress: a stage a question.
        form: of the graph.
        built: compare the TensorRT engine that was built from the graph, not the graph.

    Returns:
        The report, as saved in ``reports/validate.json`` (``validate-<form>.json``,
        ``validate-engine.json``); its ``status`` is "passed" or "failed".

    Raises:
        ArtifactError: the run is not exported or built, or the export is not of its routers.
        MissingExtraError: onnxruntime is not installed.
        ModelError: the routers decide once a token.
        MskipError: an engine, and no GPU.
    """
    recipe = run.recipe()
    require_unit(routing_unit(run), "sequence", "an engine")
    spec = recipe.validation
    routers = load_routers(run, base)
    command, folder = form.export_command, form.folder(run)
    exported = run.report(form.report("export"), f"Make it with: {command}")
    if exported.get("router_sha256") != routers_hash(run):
        raise ArtifactError(
            f"{folder} is an export of other routers than {run.path} now holds.",
            f"Export again: {command}",
        )
    engine: Runner = open_engine(folder) if built else open_runner(folder)
    divided = calibrated_samples(run, recipe, base, progress)
    samples = [*divided.held_out, *divided.calibration][: spec.prompts]
    prompts = [sample.input_ids[: sample.prompt_length] for sample in samples]
    with TorchRunner(base, routers, engine.contract) as reference:
        found = compare(reference, engine, prompts, spec.steps, progress)
        invariance = batch_invariance(engine, prompts, progress)
        scored = samples[: recipe.evaluation.prompts]
        measured = quality(reference, engine, scored, progress)
    name, rounded = engine.name, _rounded(engine.contract, base)
    if built:
        lazy: dict[str, Any] | None = built_laziness(run, engine, prompts, progress)
        del engine
    else:
        del engine  # others are opened, and there is memory for one
        lazy = None if form.target == "trt-plugin" else measure_laziness(folder, prompts, progress)
    report: dict[str, Any] = {
        "status": "",
        "engine": name,
        "weights": form.weights,
        "rounded": rounded,
        "gates": [],
        "decisions": {
            "calls": found.calls,
            "agreement": found.agreement,
            "flips": found.flips,
            "min_margin": found.min_margin,
        },
        "logits": {
            "max_abs": found.max_abs,
            "max_rel": found.max_rel,
            "kl": found.kl / found.positions,
        },
        "tokens": {
            "prompts": found.prompts,
            "steps": spec.steps,
            "match": found.matching / found.prompts,
            "next_match": found.next_matching / found.positions,
        },
        "laziness": lazy,
        "batch_invariance": invariance,
        "quality": measured,
    }
    gates = gates_of(report, spec)
    report["gates"] = [asdict(gate) for gate in gates]
    report["status"] = "failed" if any(gate.passed is False for gate in gates) else "passed"
    run.write_report("validate-engine" if built else form.report("validate"), report)
    return report
