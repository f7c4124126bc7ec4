"""The mixed load, for seconds, on a tiny run: nothing wrong, nothing held, nothing crashed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mskip.compressor.router import Routers


def test_a_short_soak(
    tiny_folder: Path, tiny_routers: Callable[..., Routers], tmp_path: Path
) -> None:
    import serving_soak
    from tiny_runs import tiny_run

    from mskip.compressor.dial import find_dial
    from mskip.compressor.models import load_base
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.targets import Form

    run = tiny_run(tmp_path, tiny_folder, tiny_routers)
    base = load_base(run.recipe().model)
    export_run(run, base, form=Form("ort"))
    find_dial(run, base, steps=4)
    report = serving_soak.soak(run, 0.1, 1, tmp_path / "place")
    assert report["wrong"] == 0, report["faults"]
    assert not report["crashed"]
    assert set(report["held_at_the_end"].values()) == {0.0}
    assert {"whole", "drawn", "cancelled", "bad"} <= set(report["counts"])
    assert report["outcomes"]["error"] == 0
