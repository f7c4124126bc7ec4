"""The builders of TensorRT engines: TensorRT itself, and TensorRT-RTX. A row each.

Both have nearly one Python interface; where they differ is said here and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mskip.compressor.errors import MskipError


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class BuilderRow:
    """One builder.

    Attributes:
        name: as on the command line.
        modules: names under which it may be installed.
        install: command that installs it.
        crosses: whether it builds for compute capabilities that are named, without a GPU.
        plugins: whether it has plugins in Python, compiled ahead of time.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    crosses: bool
    plugins: bool

    def module(self) -> Any:
        """Its Python module; None if it is not installed.

        The public index has packages named like TensorRT's that only say where the real ones are.
        """
        for name in self.modules:
            try:
                found = importlib.import_module(name)
            except (ImportError, OSError, RuntimeError):
                continue
            if hasattr(found, "Builder"):
                return found
        return None


BUILDERS = [
    BuilderRow("tensorrt", ("tensorrt",), "pip install tensorrt-cu13", crosses=False, plugins=True),
    BuilderRow(
        "tensorrt-rtx",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install 'mskip[trt-rtx]'",
        crosses=True,
        plugins=False,
    ),
]


@dataclass(frozen=True)
class Chosen:
    """A builder that can build here.

    Attributes:
        row: which.
        module: its Python module.
    """

    row: BuilderRow
    module: Any

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.row.name} {self.module.__version__}"

    def capability(self, value: str) -> Any:
        """The module's constant for a compute capability such as "8.9".

        Raises:
            MskipError: this version builds for no such one.
        """
        known = self.module.ComputeCapability.__members__
        name = f"SM{value.replace('.', '')}"
        if name in known:
            return known[name]
        numbers = [each[2:] for each in known if each.startswith("SM")]
        raise MskipError(
            f"{self.title} builds for no compute capability {value}.",
            f"It has: {', '.join(f'{each[:-1]}.{each[-1]}' for each in numbers)}.",
        )


def choose(
    name: str | None,
    capabilities: Sequence[str],
    has_device: Callable[[], bool] = _has_device,
    *,
    plugins: bool = False,
) -> Chosen:
    """The first builder that is installed and can build here.

    Args:
        name: one of `BUILDERS`; None for the first.
        capabilities: compute capabilities to build for; none for the GPU of this machine.
        has_device: whether this machine has one.
        plugins: whether the graph needs some.

    Raises:
        MskipError: there is none; it says which command installs one.
    """
    rows = [row for row in BUILDERS if name in (None, row.name)]
    if not rows:
        raise MskipError(
            f"no TensorRT builder {name!r}.",
            f"There are: {', '.join(row.name for row in BUILDERS)}.",
        )
    if plugins:
        rows = [row for row in rows if row.plugins]
        if not rows:
            raise MskipError(
                f"{name} has no plugins.",
                "Use --trt-mode if, or --trt-builder tensorrt on the machine with the GPU; the "
                "graph alone: mskip export --target trt-plugin.",
            )
    installed = [Chosen(row, module) for row in rows if (module := row.module()) is not None]
    if not installed:
        raise MskipError(
            f"not installed: {' and '.join(row.name for row in rows)}.",
            f"Install with: {' or '.join(row.install for row in rows)}",
        )
    for chosen in installed:
        if chosen.row.crosses if capabilities else has_device():
            for each in capabilities:
                chosen.capability(each)
            return chosen
    titles = " and ".join(chosen.title for chosen in installed)
    if not capabilities:
        raise MskipError(
            f"{titles}: no CUDA device here to build for.",
            "Name one: --compute-capability 8.9 (with tensorrt-rtx), or build where it runs.",
        )
    crossing = next(row for row in BUILDERS if row.crosses)
    raise MskipError(
        f"{titles}: builds for the GPU of its own machine only.",
        f"Use: {crossing.install}, then --trt-builder {crossing.name}",
    )
