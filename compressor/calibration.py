"""Finding tau for a capacity, in the real gated forward pass.

Skipping an early sublayer changes every later score, so a quantile of the
dense model's scores is not enough. What makes the search exact and cheap: for
one prompt, the path of decisions is constant while tau stays between the
highest score that was skipped and the lowest that was executed. Each trial of
tau therefore runs only the prompts whose path it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mskip.compressor.encoding import Sample
from mskip.compressor.errors import MskipError
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, HardPass, fresh_decisions
from mskip.compressor.samples import batches_of
from mskip.compressor.segments import SplitModel, Stem

Scorer = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]
"""(tau [routed], prompt numbers) -> decisions bool and scores float32, [prompts, routed]."""


class PromptScorer:
    """Scores prompts in the gated forward pass; the model must be patched.

    Args:
        base: the base model.
        routers: its routers.
        samples: only their prompts are used.
        batch_size: prompts per forward pass.
    """

    def __init__(
        self, base: BaseModel, routers: Routers, samples: list[Sample], batch_size: int = 16
    ) -> None:
        self.routers = routers
        self.split = SplitModel(base.model, routers.layers[0])
        prompts = [Sample(s.input_ids[: s.prompt_length], s.prompt_length) for s in samples]
        # In order of length, as the batches are: alike prompts run together.
        self.prompts = sorted(prompts, key=lambda prompt: len(prompt.input_ids))
        self._stems: list[tuple[Tensor, Stem]] = []
        with torch.no_grad():
            for batch in batches_of(self.prompts, base, batch_size):
                inputs = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
                self._stems.append((batch["prompt_mask"], self.split.stem(*inputs)))

    def __len__(self) -> int:
        return len(self.prompts)

    @torch.no_grad()
    def __call__(self, tau: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """See `Scorer`."""
        wanted = set(numbers)
        decisions, scores = [], []
        start = 0
        for mask, stem in self._stems:
            size = len(mask)
            rows = [n - start for n in range(start, start + size) if n in wanted]
            start += size
            if not rows:
                continue
            part = stem if len(rows) == size else stem.rows(rows)
            fresh = fresh_decisions(len(rows), len(self.routers.layers))
            device = mask.device
            routing = HardPass(
                self.routers,
                tau.to(device),
                mask[rows],
                fresh[0].to(device),
                fresh[1].to(device),
            )
            self.split.finish(part, routing)
            decisions.append((routing.decisions == EXECUTE).cpu())
            scores.append(routing.scores.cpu())
        return torch.cat(decisions), torch.cat(scores)


ABOVE_EVERY_SCORE = 1.0 + 2.0**-23
"""The float32 next to 1: a score may be 1 exactly."""


def _float32(value: float) -> float:
    """What a threshold becomes where it is compared: scores and taus are float32."""
    return float(torch.tensor(value, dtype=torch.float32))


class Paths:
    """Decisions of every prompt as a function of one global tau, evaluated where needed.

    Args:
        scorer: runs prompts; see `Scorer`.
        prompts: how many prompts there are.
        routed: number of routed sublayers.
    """

    def __init__(self, scorer: Scorer, prompts: int, routed: int) -> None:
        self.scorer = scorer
        self.prompts = prompts
        self.routed = routed
        self.evaluations = 0
        # Per prompt: (low, high, decisions, scores), valid for low < tau <= high.
        self._known: list[list[tuple[float, float, Tensor, Tensor]]] = [[] for _ in range(prompts)]

    def at(self, tau: float) -> tuple[Tensor, Tensor]:
        """Decisions (bool) and scores at ``tau``, a float32 value, [prompts, routed] each."""
        missing = [n for n in range(self.prompts) if self._find(n, tau) is None]
        if missing:
            self.evaluations += 1
            decisions, scores = self.scorer(torch.full((self.routed,), tau), missing)
            for row, number in enumerate(missing):
                taken, score = decisions[row], scores[row]
                low = max((float(s) for s in score[~taken]), default=-math.inf)
                high = min((float(s) for s in score[taken]), default=math.inf)
                self._known[number].append((low, high, taken, score))
        found = [self._find(n, tau) for n in range(self.prompts)]
        return (
            torch.stack([each[2] for each in found if each is not None]),
            torch.stack([each[3] for each in found if each is not None]),
        )

    def _find(self, number: int, tau: float) -> tuple[float, float, Tensor, Tensor] | None:
        return next((each for each in self._known[number] if each[0] < tau <= each[1]), None)

    def interval(self, tau: float) -> tuple[float, float]:
        """Widest (low, high] around ``tau`` in which no prompt's path changes."""
        self.at(tau)
        found = [self._find(n, tau) for n in range(self.prompts)]
        known = [each for each in found if each is not None]
        return max(each[0] for each in known), min(each[1] for each in known)


class UnreachableError(MskipError):
    """No tau gives the wanted capacity; the nearest reachable ones are in the message."""


@dataclass(frozen=True)
class Found:
    """A threshold.

    Attributes:
        tau: the threshold, in the middle of the gap between the nearest scores.
        capacity: executed share on the calibration prompts.
        evaluations: trials of tau that ran prompts.
    """

    tau: float
    capacity: float
    evaluations: int


def find_tau(
    paths: Paths,
    target: float,
    max_evaluations: int,
    progress: Progress = silent,
    *,
    ties: int = 1,
) -> Found:
    """Find the global tau whose capacity is nearest to ``target``.

    It comes within half a call, with two exceptions. Where scores tie, no tau parts
    them, and that is an error. Where one decision drags later ones of its prompt
    along, the capacity leaps over the target, and the nearer side is returned.

    Args:
        paths: the prompts.
        target: wanted capacity, 0..1.
        max_evaluations: most trials that run prompts.
        progress: one unit a trial.
        ties: as many calls of one score are one decision that drags the others along.

    Raises:
        UnreachableError: scores tie around the target.
    """
    calls = paths.prompts * paths.routed
    wanted = target * calls
    tolerance = 0.5 + 1e-9
    # Above every score nothing is executed, at zero everything is.
    low, high = 0.0, ABOVE_EVERY_SCORE
    executed_low, executed_high = calls, 0
    best: tuple[float, float, int] | None = None
    tau = 0.5
    while True:
        decisions, scores = paths.at(tau)
        executed = int(decisions.sum())
        distance = abs(executed - wanted)
        progress(
            "calibrate", paths.evaluations, max_evaluations, f"capacity {executed / calls:.3f}"
        )
        if best is None or distance < best[0]:
            best = (distance, tau, executed)
        if distance <= tolerance or paths.evaluations >= max_evaluations:
            break
        gap = paths.interval(tau)
        if executed > wanted:
            low, executed_low = max(low, min(gap[1], high)), executed
        else:
            high, executed_high = min(high, max(gap[0], low)), executed
        following = _next_trial(scores, wanted, low, high)
        if following is None:
            break
        tau = following
    assert best is not None
    distance, tau, executed = best
    if distance > tolerance:
        for end, share in ((0.0, 1.0), (ABOVE_EVERY_SCORE, 0.0)):
            if abs(share * calls - wanted) <= tolerance:
                return Found(end, share, paths.evaluations)
    if distance > tolerance and _tied(paths, low) > ties:
        near = sorted({executed_low / calls, executed_high / calls, executed / calls})
        raise UnreachableError(
            f"no tau gives capacity {target:.3f}: scores tie or gates are constant. Reachable "
            f"next to it: {', '.join(f'{value:.3f}' for value in near)} "
            f"(skip rate {', '.join(f'{1 - value:.3f}' for value in near)}).",
            "Ask for one of these, or tune with another routing.capacity.",
        )
    below, above = paths.interval(tau)
    middle = _float32((max(below, 0.0) + min(above, 1.0)) / 2)
    if below < middle <= above:
        tau = middle
    return Found(tau, executed / calls, paths.evaluations)


def _next_trial(scores: Tensor, wanted: float, low: float, high: float) -> float | None:
    """A float32 in (low, high], if there is one: by the scores at hand, else by bisection."""
    ordered = scores.flatten().sort(descending=True).values
    kept = min(max(round(wanted), 1), len(ordered) - 1)
    guess = float((ordered[kept - 1] + ordered[kept]) / 2)
    if low < guess < high:
        # A guess that hugs one end closes in on it one score at a time.
        width = high - low
        guess = min(max(guess, low + 0.05 * width), high - 0.05 * width)
    else:
        guess = (low + high) / 2
    guess = _float32(guess)
    if guess <= low:  # Neighbours in float32: the upper one is a threshold of its own.
        guess = high
    return guess if low < guess <= high else None


def _tied(paths: Paths, boundary: float) -> int:
    """How many executed calls have the score at which the search closed in."""
    decisions, scores = paths.at(boundary)
    return int((scores[decisions] == boundary).sum())


def find_tau_per_layer(scorer: Scorer, prompts: int, routed: int, target: float) -> Tensor:
    """One tau a layer, so that every layer executes the target share of the prompts.

    Layer by layer: the scores of a layer are taken with the taus of all layers
    before it in force.

    Args:
        scorer: runs prompts.
        prompts: how many there are.
        routed: number of routed sublayers.
        target: wanted capacity of every layer.

    Returns:
        [routed], float32.
    """
    tau = torch.full((routed,), 0.5)
    kept = round(target * prompts)
    for index in range(routed):
        _, scores = scorer(tau, list(range(prompts)))
        ordered = scores[:, index].sort(descending=True).values
        upper = float(ordered[kept - 1]) if kept else ABOVE_EVERY_SCORE
        lower = float(ordered[kept]) if kept < prompts else 0.0
        middle = _float32((upper + lower) / 2)
        tau[index] = middle if lower < middle <= upper else upper
    return tau


def capacity_interval(decisions: Tensor, *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the capacity over prompts, by the bootstrap.

    Decisions of one prompt hang together, so whole prompts are drawn.

    Args:
        decisions: [prompts, routed], bool.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    share = decisions.float().mean(dim=1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(share), (resamples, len(share)), generator=generator)
    means = share[draws].mean(dim=1)
    return [float(q) for q in torch.quantile(means, torch.tensor([0.025, 0.975]))]
