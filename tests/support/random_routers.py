"""Random routers for the tiny models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from architectures import HIDDEN

if TYPE_CHECKING:
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Granularity


def routers_of(layers: list[int], kind: Granularity, compensated: bool) -> Routers:
    """Of ``layers``, the same at each call; with maps of rank 4 if ``compensated``."""
    import torch

    from mskip.compressor.compensation import Compensation
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Sublayers

    generator = torch.Generator().manual_seed(3)
    compensation = None
    if compensated:
        compensation = Compensation(len(layers), HIDDEN, 4)
        for value in compensation.parameters():
            value.data.normal_(std=0.3, generator=generator)
        compensation.requires_grad_(False)
    routers = Routers(Sublayers(layers, kind, compensation), HIDDEN).requires_grad_(False)
    routers.weight.normal_(std=1.0, generator=generator)
    return routers
