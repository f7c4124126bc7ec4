"""Memory and time of an export, on random models of a real model's size.

    python benchmarks/export_memory.py --output results/export-memory.json

A Llama shape is written to a temporary folder, then loaded and exported in a process of its
own, whose largest resident memory is read from the system: the weights, the libraries, and
all that loading and exporting add. Time is taken for several numbers of layers, to see that
it grows in a straight line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from random_run import SHAPE, write_model

if TYPE_CHECKING:
    from mskip.exporters.contract import Weights


def export(
    folder: Path, out: Path, layers: int, dtype: str, weights: Weights, to: Connection
) -> None:
    """Load and export; sends what it took."""
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import ModelSpec
    from mskip.compressor.router import Routers
    from mskip.exporters.onnx_export import LIBRARIES_RSS, contract_of, export_onnx, peak_rss
    from mskip.exporters.targets import PORTABLE, Form

    base = load_base(ModelSpec(name=str(folder), dtype=dtype))
    loaded = peak_rss()
    routed = list(range(layers // 2, layers - 1))
    routers = Routers(routed, SHAPE["hidden_size"]).requires_grad_(False)
    started = time.monotonic()
    form = PORTABLE if weights == "float" else Form("ort", weights)
    contract = contract_of(base, routers, [0.5] * len(routed), 21, form)
    export_onnx(base, routers, contract, out, routed[::2])
    size = sum(parameter.nbytes for parameter in base.model.parameters())
    to.send(
        {
            "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
            "weights_bytes": size,
            "libraries_bytes": LIBRARIES_RSS,
            "peak_bytes_when_loaded": loaded,
            "peak_bytes": peak_rss(),
            "peak_over_weights": round(peak_rss() / size, 3),
            "seconds": round(time.monotonic() - started, 1),
        }
    )


def one(layers: int, dtype: str, weights: Weights, folder: Path) -> dict[str, Any]:
    """Write, load and export a model, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_model, args=(folder, layers, dtype))
    writer.start()
    writer.join()
    (folder / "onnx").mkdir()
    receiving, sending = context.Pipe(duplex=False)
    exporter = context.Process(
        target=export, args=(folder, folder / "onnx", layers, dtype, weights, sending)
    )
    exporter.start()
    sending.close()
    result: dict[str, Any] = receiving.recv()
    exporter.join()
    return {"layers": layers, "dtype": dtype, "weights": weights, **result}


def main() -> None:
    """See the module."""
    from mskip.compressor.artifact import versions
    from mskip.compressor.files import write_json
    from mskip.exporters.speed import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=[6, 22])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--weights", default="float", choices=["float", "int8", "int4"])
    arguments = parser.parse_args()
    rows = []
    for dtype in arguments.dtypes:
        for layers in arguments.layers:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(layers, dtype, arguments.weights, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    write_json(
        arguments.output,
        {
            "rows": rows, "shape": SHAPE, "machine": machine("PyTorch", None),
            "versions": versions(), "date": datetime.date.today().isoformat(),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
