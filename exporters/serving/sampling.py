"""The next token from logits: greedy, or drawn with temperature, top-k and top-p.

The three filters are those of Hugging Face's `generate`, in its order. numpy only, so that a
server needs nothing else. Each sequence draws from a generator of its own, so its tokens do not
depend on what it is batched with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_FEW = 1024
"""Largest logits that top-p looks at first; sorting a whole vocabulary takes milliseconds."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: only so many of the likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability, 0 < top_p <= 1.
        seed: of the draws; None takes another one every time.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            "temperature": (self.temperature, "0 or more", 0 <= self.temperature < math.inf),
            "top_k": (self.top_k, "0 (all tokens) or more", self.top_k >= 0),
            "top_p": (self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            "seed": (self.seed, "0 or more", self.seed is None or self.seed >= 0),
        }
        for name, (value, words, fine) in wrong.items():
            if not fine:
                raise ValueError(f"{name} {value} is out of range. It must be {words}.")


GREEDY = Sampling()


def candidates(logits: Floats, sampling: Sampling) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: [vocabulary].
        sampling: with a temperature above 0.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    size = len(scaled)
    kept = min(sampling.top_k or size, size)
    weights = np.exp(scaled - scaled.max())
    if kept < size:
        chosen = _largest(weights, kept)
        total = weights[chosen].sum()
    else:
        total = weights.sum()
        chosen = _largest(weights, min(_FEW, size) if sampling.top_p < 1 else size)
        if weights[chosen].sum() < sampling.top_p * total:
            chosen = _largest(weights, size)
    probabilities = weights[chosen] / total
    if sampling.top_p < 1:
        # The token that crosses the bound is in; so the likeliest one always is.
        within = np.cumsum(probabilities) - probabilities < sampling.top_p
        chosen, probabilities = chosen[within], probabilities[within]
    return chosen, probabilities / probabilities.sum()


def _largest(weights: npt.NDArray[np.float64], count: int) -> Ints:
    """Indices of the largest, in falling order; of equals the first."""
    some: Ints = np.arange(len(weights))
    if count < len(weights):
        some = np.sort(np.argpartition(-weights, count - 1)[:count])
    order: Ints = np.argsort(-weights[some], kind="stable")
    largest: Ints = np.take(some, order)
    return largest


class Sampler:
    """Draws tokens for the sequences of a batch, step by step.

    Args:
        sampling: how.
        rows: sequences.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        seeds = np.random.SeedSequence(sampling.seed).spawn(rows)
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, logits: Floats) -> Ints:
        """The next token of each sequence, [rows]; ``logits`` is [rows, vocabulary]."""
        if self.sampling.temperature == 0:
            greedy: Ints = logits.argmax(axis=-1).astype(np.int64)
            return greedy
        drawn = np.empty(len(logits), dtype=np.int64)
        for row, (generator, scores) in enumerate(zip(self._generators, logits, strict=True)):
            tokens, probabilities = candidates(scores, self.sampling)
            bounds = np.cumsum(probabilities)
            place = int(np.searchsorted(bounds, generator.random(), side="right"))
            drawn[row] = tokens[min(place, len(tokens) - 1)]
        return drawn
