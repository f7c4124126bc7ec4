"""What is routed: which sublayers, of which kind, and what stands in where one is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mskip.compressor.errors import ModelError

if TYPE_CHECKING:  # Recipes are read without torch.
    from mskip.compressor.compensation import Compensation

Granularity = Literal["attention", "mlp", "block"]
Unit = Literal["sequence", "token"]

_REMEDIES: dict[Unit, str] = {
    "sequence": "They run in PyTorch only: attach them with TokenSkip (docs/per-token.md), or "
    "tune with routing.unit=sequence.",
    "token": "Attach them with MindSkip, or tune with routing.unit=token.",
}


@dataclass(frozen=True)
class Sublayers:
    """The routed sublayers of a model.

    Attributes:
        layers: decoder layer index of each, in the order of the routers.
        granularity: attention, MLP, or the whole block of the layer.
        compensation: what a skipped sublayer adds to the residual stream; None adds
            nothing (the paper's identity).
        unit: what decides: the prompt for its whole sequence, or every token for itself.
    """

    layers: list[int]
    granularity: Granularity = "attention"
    compensation: Compensation | None = None
    unit: Unit = "sequence"

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def compensation_rank(self) -> int:
        """Rank of the maps that stand in for what is skipped; 0 for nothing."""
        return 0 if self.compensation is None else self.compensation.rank

    @property
    def cached(self) -> list[int]:
        """Decoder layers whose keys and values only executing sequences have."""
        return [] if self.granularity == "mlp" else list(self.layers)


def require_unit(unit: Unit, wanted: Unit, what: str) -> None:
    """Refuse routers of another unit than ``what`` can run.

    Args:
        unit: of the routers.
        wanted: the only one that ``what`` knows.
        what: names what refuses, at the beginning of the message.

    Raises:
        ModelError: the two differ.
    """
    if unit != wanted:
        raise ModelError(
            f"{what} takes one decision a {wanted}; these routers decide once a {unit}.",
            _REMEDIES[wanted],
        )


def as_sublayers(value: Sublayers | Sequence[int]) -> Sublayers:
    """A bare list of layers means their attention."""
    return value if isinstance(value, Sublayers) else Sublayers(list(value))
