"""Where the time goes: ONNX Runtime's own profile, summed over kinds of nodes."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.artifact import Run
from mskip.compressor.progress import Progress, silent
from mskip.exporters.laziness import filled
from mskip.exporters.onnx_export import DENSE, MODEL
from mskip.exporters.opening import open_runner
from mskip.exporters.ort_runner import runtime
from mskip.exporters.speed import machine, sample_text
from mskip.exporters.targets import PORTABLE, Form

ROUNDS = 3
"""Prefills that are counted; one before them is not."""
STEPS = 8
"""Decoding steps after each."""
VARIANTS: dict[str, tuple[str, int | None]] = {
    "dense": (DENSE, None),
    "execute": (MODEL, 1),
    "skip": (MODEL, 0),
}
"""Graph and forced decision."""

_END = "_kernel_time"


def self_times(profile: Path) -> list[tuple[Counter[str], Counter[str]]]:
    """Time of each call's nodes, and their number, by kind.

    A conditional's time is without that of the nodes that ran in its branch.

    Args:
        profile: the JSON that the runtime wrote.

    Returns:
        Microseconds and counts, a pair for each call, in order.
    """
    events = json.loads(profile.read_text("utf-8"))
    calls = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_END)]
    # What contains comes before what it contains.
    nodes.sort(key=lambda event: (event["ts"], -event["dur"]))
    results: list[tuple[Counter[str], Counter[str]]] = [(Counter(), Counter()) for _ in calls]
    around: list[int] = []  # ends of the conditionals that are running
    number = 0
    for event in nodes:
        kind, start = event["args"]["op_name"], event["ts"]
        while number < len(calls) - 1 and start >= calls[number][1]:
            number += 1
        times, counts = results[number]
        while around and around[-1] <= start:
            around.pop()
        if around:
            times["If"] -= event["dur"]
        times[kind] += event["dur"]
        counts[kind] += 1
        if kind == "If":
            around.append(start + event["dur"])
    return results


def profile_run(
    run: Run, form: Form = PORTABLE, context: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Profile dense, all-execute and all-skip, one prompt each.

    Args:
        run: exported in this form.
        form: which export.
        context: length of the prompt; the first of the recipe's if None.
        progress: one unit a variant.

    Returns:
        The report, as saved in ``reports/profile.json`` (``profile-<form>.json``): ``rows``, one a
        phase and kind of node, with ms of a call and number of nodes of each variant.

    Raises:
        ArtifactError: no such export, or no samples in the run.
    """
    spec = run.recipe().bench
    context = context or spec.contexts[0]
    runtime()  # without it an export helps nobody
    folder = form.exported(run)
    ids = filled(sample_text(run), context)
    found: dict[str, dict[str, tuple[Counter[str], Counter[str]]]] = {}
    for done, (name, (file, decision)) in enumerate(VARIANTS.items()):
        progress("profile", done, len(VARIANTS), name)
        with tempfile.TemporaryDirectory() as scratch:
            engine = open_runner(folder, file, threads=spec.threads, profile=Path(scratch) / "ort")
            routed = len(engine.contract.routed_layers)
            routing = None
            if decision is not None:
                routing = np.full((1, routed), decision, dtype=np.int64)
            for _ in range(ROUNDS + 1):
                state = engine.prefill(ids, routing=routing, last_only=True)
                for _ in range(STEPS):
                    engine.extend(state, ids[:, :1])
            calls = self_times(engine.end_profile())
        counted = calls[1 + STEPS :]
        found[name] = {
            "prefill": _sums(counted[:: 1 + STEPS]),
            "decode": _sums([c for n, c in enumerate(counted) if n % (1 + STEPS)]),
        }
    progress("profile", len(VARIANTS), len(VARIANTS))
    report = {
        "machine": machine(engine.name, spec.threads),
        "date": datetime.date.today().isoformat(),
        "context": context,
        "rows": [row for phase in ("prefill", "decode") for row in _rows(found, phase)],
    }
    run.write_report(form.report("profile"), report)
    return report


def _sums(calls: list[tuple[Counter[str], Counter[str]]]) -> tuple[Counter[str], Counter[str]]:
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for one_times, one_counts in calls:
        times.update(one_times)
        counts.update(one_counts)
    share = 1 / len(calls)
    return (
        Counter({kind: value * share for kind, value in times.items()}),
        Counter({kind: round(value * share) for kind, value in counts.items()}),
    )


def _rows(
    found: dict[str, dict[str, tuple[Counter[str], Counter[str]]]], phase: str
) -> list[dict[str, Any]]:
    """Longest in any variant first."""
    kinds = {kind for phases in found.values() for kind in phases[phase][0]}
    rows = []
    for kind in kinds:
        row: dict[str, Any] = {"phase": phase, "kind": kind}
        for name, phases in found.items():
            times, counts = phases[phase]
            row[f"{name}_ms"] = round(times[kind] / 1e3, 4)
            row[f"{name}_nodes"] = counts[kind]
        rows.append(row)
    return sorted(rows, key=lambda row: -max(row[f"{name}_ms"] for name in VARIANTS))
