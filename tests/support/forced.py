"""What an engine gives for prompts and the tokens after them, decisions forced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mskip.exporters.runner import Runner


def batch_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of ``count`` prompts of 3, 4, 5 ... tokens, padded on the left."""
    from mskip.exporters.runner import left_padded

    rng = np.random.default_rng(5)
    return left_padded([rng.integers(4, 90, 3 + n).tolist() for n in range(count)], 0)


def forced_logits(
    runner: Runner, ids: np.ndarray, mask: np.ndarray, routing: np.ndarray | None
) -> np.ndarray:
    """Logits of a prefill, a chunk of three tokens and a step; zeros on padding."""
    state = runner.prefill(ids, mask, routing=routing)
    parts = [np.where(mask[..., None] > 0, state.logits, 0)]
    for width in (3, 1):
        state = runner.extend(state, np.full((len(ids), width), 7, dtype=np.int64))
        parts.append(state.logits)
    return np.concatenate(parts, axis=1)
