"""Is a skipped branch really not executed? Proved twice: by time and by the runtime's profile."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.artifact import Run
from mskip.compressor.progress import Progress, silent
from mskip.exporters.builder import branch_prefix
from mskip.exporters.contract import Contract
from mskip.exporters.opening import open_runner
from mskip.exporters.runner import Ints, Runner

CONTEXT = 256
REPEATS = 7
_ATTENTION = ("Softmax", "GroupQueryAttention")
"""One kernel of one of these names runs for an attention, decomposed or fused."""


def filled(prompts: Sequence[Sequence[int]], length: int, batch: int = 1) -> Ints:
    """Real text of an exact length: the prompts on end, repeated, [batch, length] int64."""
    stream = [token for prompt in prompts for token in prompt]
    rows = [np.resize(np.roll(stream, -17 * row), length) for row in range(batch)]
    return np.asarray(rows, dtype=np.int64)


def branch_nodes(profile: Path, contract: Contract) -> tuple[int, int]:
    """Count kernels in a profile of ONNX Runtime.

    Args:
        profile: the JSON that the runtime wrote.
        contract: of the graph that ran.

    Returns:
        Kernels that ran in the then-branches of these layers, and Softmax kernels in all:
        one for each attention that ran, whatever its nodes are called after fusion.
    """
    prefixes = tuple(branch_prefix(layer, contract.granularity) for layer in contract.routed_layers)
    events = [e for e in json.loads(profile.read_text("utf-8")) if e.get("cat") == "Node"]
    inside = sum(event["name"].startswith(prefixes) for event in events)
    softmax = sum(event.get("args", {}).get("op_name") in _ATTENTION for event in events)
    return inside, softmax


def profiled(folder: Path, ids: Ints, decision: int) -> tuple[int, int]:
    """Branch nodes and Softmax kernels of one prefill and one step with every decision forced."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = open_runner(folder, profile=Path(scratch) / "ort")
        routing = np.full((len(ids), len(engine.contract.routed_layers)), decision, dtype=np.int64)
        state = engine.prefill(ids, routing=routing)
        engine.extend(state, ids[:, :1])
        return branch_nodes(engine.end_profile(), engine.contract)


def timed(engine: Runner, ids: Ints, progress: Progress = silent) -> dict[str, float]:
    """Prefill with every decision forced to skip, and to execute, in turn.

    Returns:
        ``context`` and ``repeats``, medians in ms and their ratio.
    """
    routed = len(engine.contract.routed_layers)
    times: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(REPEATS + 1):
        for decision, taken in times.items():
            routing = np.full((1, routed), decision, dtype=np.int64)
            start = time.perf_counter()
            engine.prefill(ids, routing=routing, last_only=True)
            if repeat:  # the first round warms up
                taken.append((time.perf_counter() - start) * 1e3)
        progress("laziness", repeat, REPEATS + 2)
    skip, execute = statistics.median(times[0]), statistics.median(times[1])
    return {
        "context": ids.shape[1],
        "repeats": REPEATS,
        "execute_ms": execute,
        "skip_ms": skip,
        "ratio": execute / skip,
    }


def built_laziness(
    run: Run, engine: Runner, prompts: Sequence[Sequence[int]], progress: Progress = silent
) -> dict[str, Any]:
    """Of a TensorRT engine: by time, and by what its build found outside of the conditionals.

    Returns:
        See `measure_laziness`; there is no profile to count executed kernels in.
    """
    built = run.report("tensorrt", "Build it with: mskip export --trt")
    measured = timed(engine, filled(prompts, CONTEXT), progress)
    return {**measured, "skipped_branch_nodes": len(built["outside"])}


def measure_laziness(
    folder: Path, prompts: Sequence[Sequence[int]], progress: Progress = silent
) -> dict[str, Any]:
    """Time forced-skip against forced-execute, and look into the profile of both.

    Args:
        folder: of the export.
        prompts: token ids to fill the context with.
        progress: one unit a repeat.

    Returns:
        Medians in ms, their ratio, and the counts of `branch_nodes` for both.
    """
    engine = open_runner(folder)
    ids = filled(prompts, CONTEXT)
    measured = timed(engine, ids, progress)
    dense_attention = len(engine.contract.cached_layers) - len(engine.contract.compact_layers)
    del engine
    skipped, skip_softmax = profiled(folder, ids, 0)
    progress("laziness", REPEATS + 1, REPEATS + 2)
    executed, execute_softmax = profiled(folder, ids, 1)
    progress("laziness", REPEATS + 2, REPEATS + 2)
    return {
        **measured,
        # A kernel under another name would show in the Softmax count: two calls
        # (prefill, step) of the layers that always run.
        "skipped_branch_nodes": skipped + max(0, skip_softmax - 2 * dense_attention),
        "executed_branch_nodes": executed,
        "softmax_kernels": {"skip": skip_softmax, "execute": execute_softmax},
    }
