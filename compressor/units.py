"""Both units of routing, the sequence and the token, behind one face.

What finds tau and what measures a routed model is the same for either: `prompt_paths` gives
the calls to search in, `routed_passes` the passes to measure with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mskip.compressor.calibration import Paths, PromptScorer
from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.models import BaseModel
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, HardPass, Pass, fresh_decisions
from mskip.compressor.sublayers import Unit
from mskip.compressor.token_calibration import TokenPasses, token_paths


class Passes(Protocol):
    """A pass maker for `Reference` that counts what its passes execute."""

    def __call__(self, batch: Batch) -> Pass:
        """The pass of a batch."""
        ...

    @property
    def capacity(self) -> float:
        """Executed share of the calls in all batches so far: of prompts, or of their tokens."""
        ...

    @property
    def answer_capacity(self) -> float | None:
        """The same of the answers' tokens; None where these decide nothing."""
        ...


class SequencePasses:
    """See `Passes`: decides from the prompts.

    Args:
        routers: the routers.
        tau: [routed].
    """

    answer_capacity: float | None = None

    def __init__(self, routers: Routers, tau: Tensor) -> None:
        self.routers = routers
        self.tau = tau
        self._decided: list[Tensor] = []

    def __call__(self, batch: Batch) -> HardPass:
        """The pass of a batch."""
        mask = batch["prompt_mask"]
        decisions, scores = fresh_decisions(len(mask), len(self.routers.layers))
        self._decided.append(decisions := decisions.to(mask.device))
        tau = self.tau.to(mask.device)
        return HardPass(self.routers, tau, mask, decisions, scores.to(mask.device))

    @property
    def capacity(self) -> float:
        """See `Passes`."""
        return float((torch.cat(self._decided) == EXECUTE).float().mean())


_PASSES: dict[Unit, Callable[[Routers, Tensor], Passes]] = {
    "sequence": SequencePasses,
    "token": TokenPasses,
}


def routed_passes(routers: Routers, tau: Tensor) -> Passes:
    """Passes that route as these routers do.

    Args:
        routers: the routers.
        tau: [routed].
    """
    return _PASSES[routers.sublayers.unit](routers, tau)


def _sequence_paths(base: BaseModel, routers: Routers, samples: list[Sample]) -> Paths:
    scorer = PromptScorer(base, routers, samples)
    return Paths(scorer, len(scorer), len(routers.layers))


_PATHS: dict[Unit, Callable[[BaseModel, Routers, list[Sample]], Paths]] = {
    "sequence": _sequence_paths,
    "token": token_paths,
}


def prompt_paths(base: BaseModel, routers: Routers, samples: list[Sample]) -> Paths:
    """Decisions of all prompts as a function of tau; the model must be patched.

    Reshaped to [-1, routed], they have a row for every prompt, or for every prompt token.

    Args:
        base: the base model.
        routers: its routers.
        samples: only their prompts are used.
    """
    return _PATHS[routers.sublayers.unit](base, routers, samples)


def ties_of(routers: Routers, samples: list[Sample]) -> int:
    """How many calls of one score are no fault in a search for tau; see `find_tau`.

    Prompts of one template begin with the same tokens, and these have the same scores.

    Args:
        routers: the routers.
        samples: those of the search.
    """
    return len(samples) if routers.sublayers.unit == "token" else 1
