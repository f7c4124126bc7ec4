"""What skipping saves, measured: interleaved in one process, ratios from pairs.

Six variants of one export share their weights: dense, routed at the calibrated
tau, every routed sublayer forced to execute, all forced to skip, the static
graph with as many removed as the target skips, and the ceiling with all
routed sublayers removed.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.artifact import Run, routing_unit
from mskip.compressor.errors import ArtifactError
from mskip.compressor.progress import Progress, silent
from mskip.compressor.sublayers import require_unit
from mskip.exporters.laziness import filled
from mskip.exporters.onnx_export import CEILING, DENSE, MODEL, STATIC
from mskip.exporters.opening import open_runner
from mskip.exporters.ort_runner import runtime
from mskip.exporters.runner import Ints, Runner, State
from mskip.exporters.targets import PORTABLE, Form
from mskip.exporters.trt_engine import engine_of
from mskip.exporters.trt_runner import TrtRunner, open_engine

QUICK_BATCHES, QUICK_CONTEXTS, QUICK_REPEATS = [1], [128, 512, 2048], 3


@dataclass
class Variant:
    """One way to run.

    Attributes:
        engine: the runner.
        decision: forced decision of every routed sublayer; None leaves them to the scores.
        state: of the last prefill.
        times: ms by phase, one a repeat.
    """

    engine: Runner
    decision: int | None = None
    state: State | None = None
    times: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    def routing(self, batch: int) -> Ints | None:
        """Forced decisions, or None."""
        routed = len(self.engine.contract.routed_layers)
        if self.decision is None or not routed:
            return None
        return np.full((batch, routed), self.decision, dtype=np.int64)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _decode(engine: Runner, state: State, ids: Ints, steps: int) -> None:
    for _ in range(steps):
        engine.extend(state, ids[:, :1])


def measure(
    variants: dict[str, Variant], ids: Ints, repeats: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Time every variant in turn, ``repeats`` rounds after one that is not counted.

    Args:
        variants: by name.
        ids: the prompts, [batch, context].
        repeats: counted rounds.
        steps: tokens decoded for one decode timing, each from the same full context.

    Returns:
        ms by variant and phase; decode is per token.
    """
    for variant in variants.values():
        variant.times = {"prefill": [], "decode": []}
    order = list(variants.values())
    for repeat in range(repeats + 1):
        # Another one goes first each round: nobody always runs after the slowest.
        order = order[1:] + order[:1]
        for variant in order:
            routing = variant.routing(len(ids))
            # Held states are freed first, or their memory would slow the next variant down.
            variant.state = None
            spent, state = _timed(
                partial(variant.engine.prefill, ids, routing=routing, last_only=True)
            )
            step_spent, _ = _timed(partial(_decode, variant.engine, state, ids, steps))
            variant.state = State(
                state.logits[:, -1:], state.routing, state.scores, state.mask, None
            )
            if repeat:
                variant.times["prefill"].append(spent)
                variant.times["decode"].append(step_spent / steps)
    return {name: variant.times for name, variant in variants.items()}


def row_of(
    times: dict[str, dict[str, list[float]]], phase: str, batch: int, context: int, capacity: float
) -> dict[str, Any]:
    """One row of the report.

    Speedup and overhead are medians over rounds of ratios within a round; efficiency is a
    ratio of differences, so it is taken from the medians. ``spread`` is half the range of
    the speedup's ratios, relative to its median.
    """
    series = {name: phases[phase] for name, phases in times.items()}
    speedups = [d / r for d, r in zip(series["dense"], series["routed"], strict=True)]
    overheads = [e / d for e, d in zip(series["execute"], series["dense"], strict=True)]
    medians = {name: statistics.median(values) for name, values in series.items()}
    saved = medians["dense"] - medians["ceiling"]
    speedup = statistics.median(speedups)
    return {
        "engine": "onnxruntime",
        "phase": phase,
        "batch": batch,
        "context": context,
        "capacity": capacity,
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "speedup": speedup,
        "speedup_skip": medians["execute"] / medians["skip"],
        # Without a measurable ceiling there is nothing to be a share of.
        "efficiency": (
            (medians["dense"] - medians["skip"]) / saved
            if saved > 0.02 * medians["dense"]
            else None
        ),
        "overhead": statistics.median(overheads),
        "repeats": len(speedups),
        "spread": (max(speedups) - min(speedups)) / 2 / speedup,
    }


def bench_run(
    run: Run,
    *,
    quick: bool = False,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    repeats: int | None = None,
    progress: Progress = silent,
    form: Form = PORTABLE,
    built: bool = False,
) -> dict[str, Any]:
    """Benchmark an exported run.

    Args:
        run: an exported run.
        quick: batch 1, contexts 128, 512, 2048, few repeats, where not given otherwise.
        batches: batch sizes; None takes the recipe's.
        contexts: prompt lengths in tokens; None takes the recipe's.
        repeats: timed rounds; None takes the recipe's.
        progress: one unit a case.
        form: whose graphs.
        built: time the TensorRT engines that were built from them.

    Returns:
        The report, as saved in ``reports/bench.json`` (``bench-<form>.json``,
        ``bench-engine.json``). Of engines, with
        ``waits``: how often a decoding step makes the host wait for the device, by engine.

    Raises:
        ArtifactError: the run is not exported, or not built with its peers.
        MissingExtraError: onnxruntime is not installed.
        ModelError: the routers decide once a token.
        MskipError: engines, and no GPU.
    """
    spec = run.recipe().bench
    require_unit(routing_unit(run), "sequence", "an engine")
    batches = list(batches or (QUICK_BATCHES if quick else spec.batches))
    contexts = list(contexts or (QUICK_CONTEXTS if quick else spec.contexts))
    repeats = repeats or (QUICK_REPEATS if quick else spec.repeats)
    files = MODEL, DENSE, STATIC, CEILING
    if not built:
        runtime()  # without it an export helps nobody
    folder = form.exported(run)
    engines: dict[str, Runner] = {}
    for name in files:
        if built:
            engines[name] = open_engine(folder, engine_of(name))
        else:
            engines[name] = open_runner(folder, name, threads=spec.threads)
    variants = {
        "dense": Variant(engines[DENSE]),
        "routed": Variant(engines[MODEL]),
        "execute": Variant(engines[MODEL], 1),
        "skip": Variant(engines[MODEL], 0),
        "static": Variant(engines[STATIC]),
        "ceiling": Variant(engines[CEILING]),
    }
    prompts = sample_text(run)
    rows: list[dict[str, Any]] = []
    cases = [(batch, context) for batch in batches for context in contexts]
    for done, (batch, context) in enumerate(cases):
        progress("bench", done, len(cases), f"batch {batch} context {context}")
        times = measure(variants, filled(prompts, context, batch), repeats, spec.decode_steps)
        routed = variants["routed"].state
        assert routed is not None
        capacity = float(routed.routing.mean())
        rows += [row_of(times, p, batch, context, capacity) for p in ("prefill", "decode")]
    progress("bench", len(cases), len(cases))
    for row in rows:
        row["engine"] = "tensorrt" if built else row["engine"]
    rows.sort(key=lambda row: (row["phase"] != "prefill", row["batch"], row["context"]))
    report = {
        "machine": machine(engines[MODEL].name, spec.threads),
        "date": datetime.date.today().isoformat(),
        "removed": {
            "static": engines[STATIC].contract.removed_layers,
            "ceiling": engines[CEILING].contract.removed_layers,
        },
        "rows": rows,
    }
    if built:
        report["waits"] = {
            name: engine.waits for name, engine in engines.items() if isinstance(engine, TrtRunner)
        }
    run.write_report("bench-engine" if built else form.report("bench"), report)
    count = len(engines[MODEL].contract.routed_layers)
    run.write_report("costs", costs_of(rows, count, engines[MODEL].name, form))
    return report


def costs_of(rows: list[dict[str, Any]], routed: int, engine: str, form: Form) -> dict[str, Any]:
    """What one routed sublayer costs where it matters most: the longest prefill of one prompt.

    It does not depend on tau, so it outlives a calibration, which may aim by it. There is one such
    report: a speedup is asked of the form that was timed last.

    Args:
        rows: of the bench report.
        routed: number of routed sublayers.
        engine: its name.
        form: of the graphs that were timed.
    """
    row = min(
        (row for row in rows if row["phase"] == "prefill"),
        key=lambda row: (row["batch"], -row["context"]),
    )
    names = ("phase", "batch", "context", "dense_ms", "execute_ms", "skip_ms")
    each = (row["execute_ms"] - row["skip_ms"]) / routed
    return {
        "engine": engine,
        "form": form.name,
        **{name: row[name] for name in names},
        "per_sublayer_ms": each,
    }


def sample_text(run: Run) -> list[list[int]]:
    """Prompts and answers that the run was made with, as token ids.

    Raises:
        ArtifactError: it has none.
    """
    import json

    path = run.path / "samples.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()[1:]
        return [json.loads(line)["input_ids"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "Make it with: mskip tune") from error


def machine(engine: str, threads: int | None) -> dict[str, Any]:
    """What the figures were taken on: class of machine, not which one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text("utf-8", errors="replace").splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads or "default",
        "onnxruntime": engine,
    }
