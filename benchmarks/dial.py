"""The dial: one exported file, tau turned from 0 to 1 at run time.

    python benchmarks/dial.py RUN --target ort --output results/dial.json

For each tau the executed share of the routed sublayers, the time of a prefill and of a decoding
step of the same prompts, all taking turns. The values of tau are quantiles of the scores that the
prompts have, so that the shares between 0 and 1 are met evenly. Beside the JSON a PNG is written.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.artifact import open_run, versions
from mskip.compressor.files import write_json
from mskip.exporters.laziness import filled
from mskip.exporters.opening import open_runner
from mskip.exporters.runner import Ints, Runner
from mskip.exporters.speed import machine, sample_text
from mskip.exporters.targets import Form

STEPS = 8


def taus_of(runner: Runner, prompts: list[Ints], count: int) -> list[float]:
    """0, quantiles of the scores, and 1."""
    routed = len(runner.contract.routed_layers)
    scores = np.concatenate(
        [
            runner.prefill(ids, tau=0.0, last_only=True).scores.reshape(routed)
            for ids in prompts
        ]
    )  # fmt: skip
    inner = np.quantile(scores, np.linspace(0, 1, count)[1:-1])
    return [0.0, *(float(tau) for tau in inner), 1.0]


def once(runner: Runner, ids: Ints, tau: float) -> tuple[float, float, float]:
    """Capacity, ms of the prefill, ms of a step."""
    start = time.perf_counter()
    state = runner.prefill(ids, tau=tau, last_only=True)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(STEPS):
        runner.extend(state, ids[:, :1])
    step = (time.perf_counter() - start) / STEPS
    return float(state.routing.mean()), prefill * 1e3, step * 1e3


def measure(
    runner: Runner, prompts: list[Ints], taus: list[float], rounds: int
) -> list[dict[str, Any]]:
    """A row a tau; medians over rounds of the mean over prompts. One round is not counted."""
    found: dict[float, list[tuple[float, float, float]]] = {tau: [] for tau in taus}
    for number in range(rounds + 1):
        for tau in taus if number % 2 else taus[::-1]:
            times = np.array([once(runner, ids, tau) for ids in prompts]).mean(axis=0)
            if number:
                found[tau].append(tuple(times.tolist()))
    rows = []
    for tau, values in found.items():
        capacity, prefill, step = zip(*values, strict=True)
        rows.append(
            {
                "tau": tau,
                "capacity": capacity[0],
                "prefill_ms": round(statistics.median(prefill), 2),
                "decode_ms": round(statistics.median(step), 3),
                "prefill_range": [round(min(prefill), 2), round(max(prefill), 2)],
                "decode_range": [round(min(step), 3), round(max(step), 3)],
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], context: int, path: Path) -> None:
    """Time against capacity, a panel a phase."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, phase, unit in zip(
        panels, ("prefill", "decode"), ("a prompt", "a token"), strict=True
    ):
        shares = [row["capacity"] for row in rows]
        middle = np.array([row[f"{phase}_ms"] for row in rows])
        low, high = np.array([row[f"{phase}_range"] for row in rows]).T
        axes.errorbar(
            shares, middle, yerr=[middle - low, high - middle],
            marker="o", markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2,
        )  # fmt: skip
        axes.set(
            title=f"{phase}, context {context}", xlabel="capacity (executed share)",
            ylabel=f"ms {unit}", xlim=(-0.03, 1.03), ylim=(0, None),
        )  # fmt: skip
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--target", choices=["portable", "ort"], default="ort")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--taus", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run, form = open_run(given.run), Form(given.target)
    runner = open_runner(form.exported(run), threads=run.recipe().bench.threads)
    texts = sample_text(run)
    prompts = [filled(texts[number::7], given.context) for number in range(given.prompts)]
    rows = measure(runner, prompts, taus_of(runner, prompts, given.taus), given.rounds)
    print(f"{'tau':>7}  {'capacity':>8}  {'prefill ms':>10}  {'decode ms':>9}")
    for row in rows:
        print(
            f"{row['tau']:7.4f}  {row['capacity']:8.3f}  {row['prefill_ms']:10.1f}  "
            f"{row['decode_ms']:9.2f}"
        )
    report = {
        "rows": rows,
        "context": given.context,
        "rounds": given.rounds,
        "target": given.target,
        "model": run.recipe().model.name,
        "machine": machine(runner.name, run.recipe().bench.threads),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(given.output, report)
    plot(rows, given.context, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
