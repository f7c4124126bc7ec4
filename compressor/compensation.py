"""Compensated skip: a low-rank map of a skipped sublayer's input stands in for its output.

The paper's skip adds nothing to the residual stream. A map of rank r costs
2 r hidden multiplications a token, needs no keys or values, and takes back
most of what skipping loses; `mskip.compressor.fitting` finds it in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def low_rank_map(hidden: Tensor, down: Tensor, up: Tensor | None, bias: Tensor) -> Tensor:
    """``hidden @ down @ up + bias`` in the dtype of ``hidden``.

    Args:
        hidden: [..., hidden], any float dtype.
        down: [hidden, rank].
        up: [rank, hidden]; None at full rank, where ``down`` is the whole map.
        bias: [hidden].
    """
    dtype = hidden.dtype
    output = hidden @ down.to(dtype)
    if up is not None:
        output = output @ up.to(dtype)
    # Autocast gives its own dtype, and the residual stream keeps its.
    return output.to(dtype) + bias.to(dtype)


class Compensation(nn.Module):
    """One affine map hidden -> hidden a routed sublayer.

    Skipped sublayer ``j`` adds ``(x @ down[j]) @ up[j] + bias[j]`` to the residual
    stream, ``x`` being its input after the norm. At full rank ``up`` is left out.

    Args:
        routed: number of routed sublayers.
        hidden_size: width of the residual stream.
        rank: of the maps, 1..hidden_size; hidden_size is full rank.

    Raises:
        ValueError: rank out of range.
    """

    def __init__(self, routed: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"rank {rank} is not in 1..{hidden_size}")
        self.down = nn.Parameter(torch.zeros(routed, hidden_size, rank))
        full = rank == hidden_size
        self.up = None if full else nn.Parameter(torch.zeros(routed, rank, hidden_size))
        self.bias = nn.Parameter(torch.zeros(routed, hidden_size))

    @property
    def rank(self) -> int:
        """Rank of the maps."""
        return self.down.shape[2]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.down.shape[1]

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """What skipped sublayer ``index`` adds to the residual stream.

        Args:
            index: position of the routed sublayer, 0..routed-1.
            hidden: its input after the norm, [..., hidden], any float dtype.

        Returns:
            [..., hidden], in the dtype of ``hidden``.
        """
        parts = self.parts(index)
        return low_rank_map(hidden, parts["down"], parts.get("up"), parts["bias"])

    def parts(self, index: int) -> dict[str, Tensor]:
        """The tensors of one sublayer's map by name: down, up (not at full rank), bias."""
        up = {} if self.up is None else {"up": self.up[index]}
        return {"down": self.down[index], **up, "bias": self.bias[index]}

    @torch.no_grad()
    def set_map(self, index: int, down: Tensor, up: Tensor | None, bias: Tensor) -> None:
        """Set the map of one sublayer.

        Args:
            index: position of the routed sublayer.
            down: [hidden, rank].
            up: [rank, hidden]; None at full rank.
            bias: [hidden].
        """
        self.down[index] = down.to(self.down)
        if self.up is not None:
            assert up is not None
            self.up[index] = up.to(self.up)
        self.bias[index] = bias.to(self.bias)
