"""Time, memory and the machine's limit over context and batch.

    python benchmarks/scaling.py RUN --output results/scaling.json

RUN is exported with `--target ort`. Five variants take turns: the dense graph, everything executed
through the conditionals, half of it (of one sequence every second routed sublayer, of several the
first half of the sequences all of them), everything skipped, and the graph without the routed
sublayers. Sessions are opened anew for every start. What a call has to compute and to read at
least is counted from the graph, and the machine's rates are measured with plain products and sums:
their quotient is the least time that a call could take. Beside the JSON a PNG is written. A case
that is there is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import PHASES, Prefill, no_times, ratio, saved_share, shown, take_turns

from mskip.compressor.artifact import open_run, versions
from mskip.compressor.files import write_json
from mskip.exporters.laziness import filled
from mskip.exporters.onnx_export import CEILING, DENSE, MODEL
from mskip.exporters.opening import open_runner
from mskip.exporters.ort_runner import OrtRunner, runtime
from mskip.exporters.runner import Ints
from mskip.exporters.speed import machine, sample_text
from mskip.exporters.targets import Form
from mskip.exporters.work import Call, work_of

VARIANTS = {"dense": DENSE, "execute": MODEL, "half": MODEL, "skip": MODEL, "ceiling": CEILING}


def routing_of(variant: str, batch: int, layers: int) -> Ints | None:
    """Decisions that are forced, [batch, layers]."""
    if not layers:
        return None
    routing = np.zeros((batch, layers), dtype=np.int64)
    if variant == "execute":
        routing[:] = 1
    elif variant == "half":
        if batch == 1:
            routing[:, ::2] = 1
        else:
            routing[: batch // 2] = 1
    return routing


def measure(
    open_engines: Callable[[], dict[str, OrtRunner]], ids: Ints, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a variant and phase.

    Sessions are opened anew for every start: where the weights came to lie is luck.
    """
    batch, context = ids.shape
    times = no_times(asked.variants)
    memory: dict[str, int] = {}
    for start in range(asked.starts):
        engines = open_engines()
        contenders = {name: _prefill(engines[name], name, ids, memory) for name in asked.variants}
        take_turns(contenders, times, rounds=asked.rounds, steps=asked.steps, seed=start)
    return [
        {
            "batch": batch,
            "context": context,
            "phase": phase,
            "variant": name,
            "ms": round(statistics.median(times[phase][name]), 3),
            "all_ms": [round(value, 2) for value in times[phase][name]],
            "kv_bytes": memory[name],
        }
        for phase in PHASES
        for name in asked.variants
    ]


def _prefill(engine: OrtRunner, name: str, ids: Ints, memory: dict[str, int]) -> Prefill:
    routing = routing_of(name, len(ids), len(engine.contract.routed_layers))

    def prefill() -> Callable[[], object]:
        state = engine.prefill(ids, routing=routing, last_only=True)

        def step() -> object:
            after = engine.extend(state, ids[:, :1])
            memory[name] = engine.kv_bytes(after)
            return after

        return step

    return prefill


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the conditionals cost and save, a row a case and phase: with intervals, see turns.py."""
    found = []
    cases = dict.fromkeys((row["phase"], row["batch"], row["context"]) for row in rows)
    for phase, batch, context in cases:
        ms = {
            row["variant"]: row["all_ms"]
            for row in rows
            if (row["phase"], row["batch"], row["context"]) == (phase, batch, context)
        }
        row = {"phase": phase, "batch": batch, "context": context}
        dense, ceiling = ms["dense"], ms["ceiling"]
        if "execute" in ms:
            row["overhead"] = ratio(ms["execute"], dense)
        if "skip" in ms:
            row["skip_to_ceiling"] = ratio(ms["skip"], ceiling)
            row["efficiency"] = saved_share(dense, ms["skip"], ceiling)
        if "half" in ms:
            row["half_to_dense"] = ratio(ms["half"], dense)
            row["efficiency_half"] = saved_share(dense, ms["half"], ceiling, layer_share(batch))
        found.append(row)
    return found


def layer_share(batch: int) -> float:
    """Skipped share of the variant "half"."""
    return 0.5 if batch == 1 else (batch - batch // 2) / batch


def rates(threads: int | None) -> dict[str, float]:
    """Float operations and bytes read in a second: the best of PyTorch and ONNX Runtime."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    size, length = 2048, 1 << 27
    left = torch.randn(size, size)
    long = torch.ones(length)
    gemm = [_best(lambda: left @ left), _best(_ort_product(size, size, threads))]
    read = [
        long.nbytes / _best(long.sum),
        4 * (1 << 27) / _best(_ort_product(1, 1 << 12, threads, 1 << 15)),
    ]
    return {"flops": 2 * size**3 / min(gemm), "bandwidth": max(read)}


def _best(call: Callable[[], Any], repeats: int = 8) -> float:
    """Seconds of the fastest."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _ort_product(
    rows: int, inputs: int, threads: int | None, outputs: int | None = None
) -> Callable[[], Any]:
    """ONNX Runtime's product of [rows, inputs] with a constant [inputs, outputs]."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    outputs = outputs or inputs
    weight = numpy_helper.from_array(np.ones((inputs, outputs), np.float32), "weight")
    given = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, columns])
        for name, columns in (("x", inputs), ("y", outputs))
    ]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", given[:1], given[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.ones((rows, inputs), np.float32)
    return lambda: session.run(None, {"x": x})


def add_limits(rows: list[dict[str, Any]], folder: Path, machine_rates: dict[str, float]) -> None:
    """Work, least time and reached share of the variants that are one static graph."""
    for row in rows:
        if row["variant"] not in ("dense", "ceiling"):
            continue
        call = Call(row["batch"], row["context"])
        if row["phase"] == "decode":
            call = Call(row["batch"], 1, row["context"])
        work = work_of(folder, VARIANTS[row["variant"]], call)
        least = work.seconds(machine_rates["flops"], machine_rates["bandwidth"]) * 1e3
        row |= {
            "flops": work.flops, "bytes": work.bytes, "limit_ms": round(least, 3),
            "limited_by": (
                "memory"
                if work.bytes / machine_rates["bandwidth"] > work.flops / machine_rates["flops"]
                else "arithmetic"
            ),
            "reached": round(least / row["ms"], 3),
        }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A row of panels over contexts at batch 1, one over batches at the context that has most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contexts = [row["context"] for row in rows if row["batch"] > 1]
    fixed = max(set(contexts), key=contexts.count) if contexts else None
    drawn = ["context"] if any(row["batch"] == 1 for row in rows) else []
    drawn += ["batch"] if contexts else []
    figure = Figure(figsize=(12, 3.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for axis, panels in zip(drawn, grid, strict=True):
        for panel, phase in zip(panels, (*PHASES, "keys and values"), strict=True):
            for name in VARIANTS:
                points = [
                    (row[axis], row)
                    for row in rows
                    if row["variant"] == name
                    and row["phase"] == (phase if phase in PHASES else "decode")
                    and (row["batch"] == 1 if axis == "context" else row["context"] == fixed)
                ]
                points.sort(key=lambda point: point[0])
                _curve(panel, name, points, phase)
            where = "batch 1" if axis == "context" else f"context {fixed}"
            panel.set(title=f"{phase}, {where}", xlabel=axis, yscale="log")
            panel.set_xscale("log", base=2)
            panel.set_ylabel("MB" if phase not in PHASES else "ms")
            panel.grid(alpha=0.3, which="both")
    grid[0][0].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def _curve(panel: Any, name: str, points: list[tuple[int, dict[str, Any]]], phase: str) -> None:
    places = [place for place, _ in points]
    timed = phase in PHASES
    values = [row["ms"] if timed else row["kv_bytes"] / 1e6 for _, row in points]
    (line,) = panel.plot(places, values, marker="o", markersize=3, linewidth=1.2, label=name)
    if timed and all("limit_ms" in row for _, row in points):
        limits = [row["limit_ms"] for _, row in points]
        label = f"{name}, least"
        panel.plot(places, limits, linestyle=":", color=line.get_color(), label=label)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--batch-context", type=int, default=512)
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="*", default=list(VARIANTS))
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="of each start")
    parser.add_argument("--steps", type=int, default=16, help="after each prefill")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if not {"dense", "ceiling"} <= set(given.variants):
        parser.error("--variants has to name dense and ceiling: the others are compared with them")
    run = open_run(given.run)
    folder, threads = Form("ort").exported(run), run.recipe().bench.threads

    def open_engines() -> dict[str, OrtRunner]:
        files = {VARIANTS[name] for name in given.variants}
        opened = {file: open_runner(folder, file, threads=threads) for file in files}
        return {name: opened[VARIANTS[name]] for name in given.variants}

    prompts = sample_text(run)
    cases = [(1, context) for context in given.contexts]
    cases += [(batch, given.batch_context) for batch in given.batches]
    rows: list[dict[str, Any]] = []
    if given.output.is_file():
        rows = json.loads(given.output.read_text("utf-8"))["rows"]
    there = {(row["batch"], row["context"]) for row in rows}
    machine_rates = rates(threads)
    print(
        f"{machine_rates['flops'] / 1e9:.0f} GFLOP/s, {machine_rates['bandwidth'] / 1e9:.1f} GB/s"
    )
    for batch, context in cases:
        if (batch, context) in there:
            continue
        found = measure(open_engines, filled(prompts, context, batch), given)
        add_limits(found, folder, machine_rates)
        rows += found
        for row in found:
            share = f"  {row['reached']:.0%} of the limit" if "reached" in row else ""
            print(
                f"batch {batch:2}  context {context:5}  {row['phase']:7}  {row['variant']:7}  "
                f"{row['ms']:9.2f} ms  {row['kv_bytes'] / 1e6:7.1f} MB{share}",
                flush=True,
            )
        for row in ratios(found):
            for name, value in row.items():
                if isinstance(value, dict):
                    print(f"{row['phase']:7}  {name:15}  {shown(value)}, {value['turns']} turns")
        report = {
            "rows": rows,
            "ratios": ratios(rows),
            "rates": machine_rates,
            "model": run.recipe().model.name,
            "machine": machine(f"onnxruntime {runtime().__version__}", threads),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        write_json(given.output, report)
    plot(rows, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
