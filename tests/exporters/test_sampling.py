"""Draws against Hugging Face's own filters, and against the distribution that they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mskip.exporters.serving.sampling import GREEDY, Sampler, Sampling, candidates


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by transformers' filters, [vocabulary]."""
    ids, scores = torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(logits).double()[None]
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


def found(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    whole = np.zeros(len(logits))
    tokens, probabilities = candidates(logits, sampling)
    whole[tokens] = probabilities
    return whole


@pytest.mark.parametrize("size", [5, 3000])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.sampled_from([0, 1, 3, 1500, 9999]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)
def test_filters_are_those_of_transformers(
    size: int, seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p)
    np.testing.assert_allclose(found(logits, sampling), expected(logits, sampling), atol=1e-9)


def test_likeliest_first() -> None:
    tokens, probabilities = candidates(np.array([1, 3, 2], np.float32), Sampling(1.0))
    assert tokens.tolist() == [1, 2, 0]
    assert (np.diff(probabilities) < 0).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, top_k=3, seed=0), 2)
    drawn = np.array([sampler(np.stack([logits, -logits])) for _ in range(6000)])
    shares = np.bincount(drawn[:, 0], minlength=4) / len(drawn)
    # 6 standard deviations of a share of 6000 draws.
    np.testing.assert_allclose(shares, np.array([0, 2, 3, 4]) / 9, atol=0.04)
    assert set(drawn[:, 1].tolist()) == {0, 1, 2}
    assert np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1] == pytest.approx(0, abs=0.08)


def test_greedy_takes_the_largest_and_draws_nothing() -> None:
    logits = np.array([[0, 2, 1], [5, 2, 1]], np.float32)
    assert Sampler(GREEDY, 2)(logits).tolist() == [1, 0]


def test_without_a_seed_draws_differ() -> None:
    logits = np.zeros((1, 1000), np.float32)
    first, second = (Sampler(Sampling(temperature=1.0), 1) for _ in "ab")
    assert [first(logits)[0] for _ in range(5)] != [second(logits)[0] for _ in range(5)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is out of range"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"seed": -3}, "seed -3"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)  # type: ignore[arg-type]
