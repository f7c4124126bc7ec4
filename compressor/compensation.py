"""Compensated skip: a low-rank map of a skipped sublayer's input stands in for its output.

The paper's skip adds nothing to the residual stream. A map of rank r costs
2 r hidden multiplications a token, needs no keys or values, and takes back
most of what skipping loses; `mskip.compressor.fitting` finds it in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        dtype = hidden.dtype
        output = hidden @ self.down[index].to(dtype)
        if self.up is not None:
            output = output @ self.up[index].to(dtype)
        return output.to(dtype) + self.bias[index].to(dtype)

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
