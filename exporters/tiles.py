"""How the kernels' work is cut: as measured on a kind of GPU and kept, else in a way that fits any.

``benchmarks/gpu_suite.py --save-tiles`` measures and writes the table, one for each machine, in
mskip's cache folder. What is compiled ahead of time goes by it, too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mskip.compressor.embedded import cache_home
from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, write_json

Kernel = Literal["linear", "attention"]
_FORMAT = 1


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut into programs.

    Attributes:
        m: rows of a program: positions of sequences; of attention, positions of grouped heads.
        n: columns of a product; keys that are read at a time.
        k: inner elements that are read at a time; not of attention, which reads a head whole.
        warps: of 32 threads, a program.
        stages: reads that are under way at once.
    """

    m: int
    n: int
    k: int = 0
    warps: int = 4
    stages: int = 3

    def constants(self) -> dict[str, int]:
        """As a kernel's constants."""
        named = {"BLOCK_M": self.m, "BLOCK_N": self.n}
        return {**named, "BLOCK_K": self.k} if self.k else named

    def to_json(self) -> dict[str, int]:
        """For the table."""
        return asdict(self)


def few(rows: int) -> bool:
    """Whether so many rows are a decoding step's rather than a prompt's."""
    return rows <= 32


def chosen(
    kernel: Kernel, capability: str | None, dtype: str, *, prompt: bool, head: int = 0
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: which.
        capability: of the GPU, such as "8.9"; None where there is none.
        dtype: of the states: "float32", "float16" or "bfloat16".
        prompt: for many rows rather than a decoding step's.
        head: elements of a head, of attention.

    Raises:
        ArtifactError: a table that cannot be read.
    """
    measured = _table(table_path()).get(_key(kernel, capability, dtype, prompt, head))
    return measured or _usual(kernel, dtype, prompt, head)


def _usual(kernel: Kernel, dtype: str, prompt: bool, head: int) -> Tile:
    """Not measured: what fits the shared memory (99 KiB) of every capability from 8.0 on."""
    if kernel == "linear":
        return Tile(64, 64, 32) if prompt else Tile(16, 32, 128)
    small = head * (4 if dtype == "float32" else 2) <= 256
    return Tile(64 if prompt and small else 16, 64 if small else 32, stages=2)


def table_path() -> Path:
    """Where measured tiles are kept."""
    return cache_home() / "tiles.json"


def save_tile(
    kernel: Kernel, capability: str, dtype: str, tile: Tile, *, prompt: bool, head: int = 0
) -> Path:
    """Keep a measured tile in this machine's table, beside those of other kernels and GPUs.

    Args:
        kernel: see `chosen`.
        capability: see `chosen`.
        dtype: see `chosen`.
        tile: the fastest.
        prompt: see `chosen`.
        head: see `chosen`.

    Returns:
        The table's file.
    """
    path = table_path()
    known = {key: each.to_json() for key, each in _table(path).items()}
    known[_key(kernel, capability, dtype, prompt, head)] = tile.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": _FORMAT, "tiles": known})
    _table.cache_clear()
    return path


def _key(kernel: Kernel, capability: str | None, dtype: str, prompt: bool, head: int) -> str:
    width = f" {head}" if head else ""
    return f"{capability} {kernel}{width} {dtype} {'prompt' if prompt else 'step'}"


@cache
def _table(path: Path) -> dict[str, Tile]:
    if not path.is_file():
        return {}
    value = read_json(path, "table of tiles")
    try:
        if value["format"] != _FORMAT:
            raise ValueError
        return {key: Tile(**each) for key, each in value["tiles"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no table of measured tiles.",
            "Delete it; benchmarks/gpu_suite.py --save-tiles writes it again.",
        ) from error
