"""Does what routing loses shrink as the model grows? One plot over tuned runs.

    python benchmarks/model_size.py runs/smollm2-135m runs/gemma3-270m --output results/model-size

Reads the comparison that every `mskip tune` ends with: KL to the dense model on held-out answers
at equal capacity, routed and removed for good. The runs should differ in nothing but the model
(and which layers it has); their settings and minutes are written beside the figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mskip.compressor.artifact import Run
from mskip.compressor.files import write_json
from mskip.compressor.memory import weight_bytes
from mskip.compressor.models import model_folder


def row_of(folder: Path) -> dict[str, Any]:
    """What a run says."""
    run = Run(folder)
    recipe = run.recipe()
    report = json.loads((run.path / "reports/tune.json").read_text(encoding="utf-8"))
    worth = report["worth"]
    return {
        "model": recipe.model.name,
        "parameters": weight_bytes(model_folder(recipe.model), "float32") // 4,
        "dtype": recipe.model.dtype,
        "routed_layers": len(report["sensitivity"]["layers"]),
        "tuning_samples": report["samples"],
        "compensation_rank": recipe.compensation.rank,
        "minutes": round(report["seconds"] / 60, 1),
        **{
            key: worth[key]
            for key in ("rule", "static_kl", "routed_kl", "routed_capacity", "difference_interval")
        },
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="without its ending")
    arguments = parser.parse_args()
    rows = sorted((row_of(run) for run in arguments.runs), key=lambda row: row["parameters"])
    write_json(arguments.output.with_suffix(".json"), {"rows": rows})
    print("| model | parameters | static KL | routed KL | capacity | minutes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['parameters'] / 1e6:.0f} M | {row['static_kl']:.3f} "
            f"({row['rule']}) | {row['routed_kl']:.3f} | {row['routed_capacity']:.3f} "
            f"| {row['minutes']} |"
        )
    plot(rows, arguments.output.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against the number of parameters, which is on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    sizes = [row["parameters"] / 1e6 for row in rows]
    for key, label in (("static_kl", "removed for good"), ("routed_kl", "routed")):
        axes.plot(sizes, [row[key] for row in rows], "o-", label=label)
    axes.set(
        xscale="log",
        ylabel="KL to the dense model, nats a token",
        title="Half of the routed attention skipped",
    )  # fmt: skip
    names = [row["model"].removeprefix("embedded:") for row in rows]
    ticks = [f"{name}\n{size:,.0f} M" for name, size in zip(names, sizes, strict=True)]
    axes.set_xticks(sizes, ticks, fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
