"""How long work reports where it is, without knowing who looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of a stage; called often, so it must be cheap."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units of ``stage`` are finished.

        Args:
            stage: what is going on, such as "tune".
            done: finished units.
            total: all units.
            note: short figures worth showing, such as the current loss.
        """
        ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""
