"""The table of measured tiles: written, read back, and gone by."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mskip.compressor.errors import ArtifactError
from mskip.exporters import tiles
from mskip.exporters.tiles import Tile, chosen, save_tile, table_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSKIP_HOME", str(tmp_path))
    tiles._table.cache_clear()
    return tmp_path


def test_a_measured_tile_is_for_its_kernel_gpu_type_and_width() -> None:
    usual = chosen("attention", "9.0", "bfloat16", prompt=False, head=128)
    fast = Tile(16, 128, warps=8, stages=3)
    assert fast != usual
    path = save_tile("attention", "9.0", "bfloat16", fast, prompt=False, head=128)
    assert path == table_path()
    save_tile("linear", "9.0", "bfloat16", Tile(16, 64, 64), prompt=False)  # keeps the other
    assert chosen("attention", "9.0", "bfloat16", prompt=False, head=128) == fast
    assert chosen("linear", "9.0", "bfloat16", prompt=False) == Tile(16, 64, 64)
    for other in (
        chosen("attention", "8.9", "bfloat16", prompt=False, head=128),
        chosen("attention", None, "bfloat16", prompt=False, head=128),
        chosen("attention", "9.0", "float16", prompt=False, head=128),
    ):
        assert other == usual
    assert chosen("attention", "9.0", "bfloat16", prompt=True, head=128) != fast
    assert chosen("attention", "9.0", "bfloat16", prompt=False, head=64) != fast


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "tiles": {}}', '{"format": 1}'])
def test_a_table_that_cannot_be_read(home: Path, text: str) -> None:
    (home / "tiles.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"tiles\.json"):
        chosen("linear", "9.0", "bfloat16", prompt=False)


COMPILE = """
from mskip.exporters.kernel_binaries import compile_linear
for capability in ("8.9", "9.0"):
    made = compile_linear("bfloat16", capability, prompt=False, transposed=False)
    print(made.tile.warps, made.ptx.split(".reqntid ")[1].split()[0])
"""


def test_what_is_compiled_ahead_of_time_goes_by_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    save_tile("linear", "8.9", "bfloat16", Tile(16, 32, 64, warps=8), prompt=False)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [[int(n) for n in re.findall(r"\d+", line)] for line in done.stdout.splitlines()]
    assert found == [[8, 256], [4, 128]]
