"""The rows of a call's arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from mskip.compressor.errors import ModelError
from mskip.compressor.patching import take_rows


def test_take_rows_takes_what_is_per_sequence() -> None:
    rows = torch.tensor([2, 0])
    mask = torch.arange(3 * 4).reshape(3, 1, 2, 2)
    shared, flat = torch.zeros(1, 5, 8), torch.arange(3)
    assert torch.equal(take_rows(mask, rows, 3), mask[[2, 0]])
    assert take_rows(shared, rows, 3) is shared
    assert take_rows(flat, rows, 3) is flat  # one dimension: positions, not sequences
    assert take_rows(None, rows, 3) is None
    pair = take_rows((mask, [shared, 1.5]), rows, 3)
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], mask[[2, 0]])
    assert pair[1] == [shared, 1.5]


def test_flex_attentions_block_mask_is_refused() -> None:
    """Its rows cannot be taken; the kernel would read another sequence's, or crash."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 8, 8, device="cpu")
    with pytest.raises(ModelError, match="flex attention"):
        take_rows(mask, torch.tensor([0]), 2)
