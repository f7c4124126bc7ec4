"""The dial: one exported file, tau turned from 0 to 1 at run time.

    python benchmarks/dial.py RUN --target ort --output results/dial.json

For each tau the executed share of the routed sublayers, the time of a prefill and of a decoding
step of the same prompts, all taking turns (see turns.py). The values of tau are quantiles of the
scores that the prompts have, so that the shares between 0 and 1 are met evenly. Beside the JSON a
PNG is written.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import PHASES, Prefill, no_times, ratio, shown, take_turns

from mskip.compressor.artifact import open_run, versions
from mskip.compressor.files import write_json
from mskip.exporters.laziness import filled
from mskip.exporters.opening import open_runner
from mskip.exporters.runner import Ints, Runner
from mskip.exporters.speed import machine, sample_text
from mskip.exporters.targets import Form


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


def measure(
    runner: Runner, prompts: list[Ints], taus: list[float], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a tau; times are medians, a prompt's relative to its own at tau 0 within a turn."""
    shares: dict[float, list[float]] = {tau: [] for tau in taus}
    times = no_times(map(str, taus))
    for number, ids in enumerate(prompts):
        contenders = {str(tau): _prefill(runner, ids, tau, shares[tau]) for tau in taus}
        take_turns(contenders, times, rounds=given.rounds, steps=given.steps, seed=number)
    return [
        {
            "tau": tau,
            "capacity": statistics.mean(shares[tau]),
            **{
                f"{phase}_ms": round(statistics.median(times[phase][str(tau)]), 3)
                for phase in PHASES
            },
            **{
                f"{phase}_to_all": ratio(times[phase][str(tau)], times[phase][str(taus[0])])
                for phase in PHASES
            },
        }
        for tau in taus
    ]


def _prefill(runner: Runner, ids: Ints, tau: float, shares: list[float]) -> Prefill:
    def prefill() -> Callable[[], object]:
        state = runner.prefill(ids, tau=tau, last_only=True)
        shares.append(float(state.routing.mean()))
        return lambda: runner.extend(state, ids[:, :1])

    return prefill


def plot(rows: list[dict[str, Any]], context: int, path: Path) -> None:
    """Time against capacity, a panel a phase."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, phase, unit in zip(panels, PHASES, ("a prompt", "a token"), strict=True):
        shares = [row["capacity"] for row in rows]
        found = [row[f"{phase}_to_all"] for row in rows]
        middle = np.array([each["value"] for each in found])
        below, above = (
            abs(middle - np.array([each[end] for each in found])) for end in ("low", "high")
        )
        axes.errorbar(
            shares, middle, yerr=[below, above],
            marker="o", markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2,
        )  # fmt: skip
        axes.set(
            title=f"{phase}, context {context}: 1 is {rows[0][f'{phase}_ms']:.0f} ms {unit}",
            xlabel="capacity (executed share)", ylabel="time, of executing everything",
            xlim=(-0.03, 1.03), ylim=(0, None),
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
    parser.add_argument("--steps", type=int, default=16, help="after each prefill")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run, form = open_run(given.run), Form(given.target)
    runner = open_runner(form.exported(run), threads=run.recipe().bench.threads)
    texts = sample_text(run)
    prompts = [filled(texts[number::7], given.context) for number in range(given.prompts)]
    rows = measure(runner, prompts, taus_of(runner, prompts, given.taus), given)
    print("of executing everything, median and 95 % interval:")
    print(f"{'tau':>7}  {'capacity':>8}  {'prefill':22}  decode")
    for row in rows:
        print(
            f"{row['tau']:7.4f}  {row['capacity']:8.3f}  {shown(row['prefill_to_all']):22}  "
            f"{shown(row['decode_to_all'])}"
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
