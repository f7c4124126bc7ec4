"""The reports of the steps as tables, within 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from mskip.cli import console
from mskip.cli.console import (
    DIM,
    WARNED,
    capacity_words,
    milliseconds,
    say,
    seconds,
    shares,
    size,
    table,
    verdict,
)

CAPACITY = ">capacity\n(skip rate)"


def next_step(run: Path, command: str) -> None:
    """Name the run folder and what comes after."""
    if console.main_process():
        say()
        say(f"run folder: {console.shown(run)}", whole=True)
        if command:
            say(f"next: {command}", DIM, whole=True)


def tuned(report: dict[str, Any]) -> None:
    """Capacity by target, the course of the loss, and static removal beside it."""
    if report["method"] == "static":
        order = report["removal_orders"][report["rule"]]
        table(
            f"Order of removal ({report['rule']})",
            ["first removed first"],
            [[", ".join(map(str, order))]],
        )
        say()
        say(f"measured on {report['samples']} sequences, {seconds(report['seconds'])}")
        return
    rows = [
        [
            shares(each["target"]),
            shares(each["capacity"]),
            f"{each['capacity'] - each['target']:+.3f}",
            str(each["steps"]),
        ]
        for each in report["targets"]
    ]
    headings = [">target (skip rate)", ">reached, held-out", ">off by", ">steps"]
    table("Tuned, before any calibration", headings, rows)
    say()
    trace = report["trace"]
    if trace:
        losses = f"{trace[0]['loss']:.3f} -> {trace[-1]['loss']:.3f}"
        say(f"loss ({report['loss']}) {losses} in {len(trace)} steps")
    say(f"{report['samples']} sequences, {seconds(report['seconds'])}")
    for each in report["targets"]:
        if abs(each["capacity"] - each["target"]) > 0.05:
            say(
                f"warning: target {each['target']:g} was missed by more than 0.05; "
                "calibration can still place tau, at a price in quality.",
                WARNED,
            )

    _worth(report["worth"])


def _worth(worth: dict[str, Any]) -> None:
    """Is deciding per prompt worth it?"""
    if "skipped" in worth:
        say(f"not compared with static removal: {worth['skipped']}", WARNED)
        return
    rows = [
        [
            f"static ({worth['rule']})",
            shares(worth["static_capacity"]),
            f"{worth['static_kl']:.4f}",
        ],
        ["routed", shares(worth["routed_capacity"]), f"{worth['routed_kl']:.4f}"],
    ]
    table("Is deciding per prompt worth it?", ["", CAPACITY, ">KL, held-out"], rows)
    say()
    if "routed_answer_capacity" in worth:  # per token, where answers decide for themselves too
        say(f"capacity of the answers' tokens: {capacity_words(worth['routed_answer_capacity'])}")
    low, high = worth["difference_interval"]
    say(f"routed - static: 95 % {low:+.4f} .. {high:+.4f} nats ({worth['prompts']} prompts)")
    if worth["better"]:
        say("Yes: routing is closer to the dense model than removing as much for good.")
        return
    removed = console.ranges(worth["removed"])
    say(f"No: removing layers {removed} for good is as good, and simpler.", WARNED)
    say("A run that does, with the same maps, in seconds: mskip static")


def calibrated(report: dict[str, Any]) -> None:
    """Capacity, tau, margins, warnings, and the layers."""
    found, margins, prompts = report["capacity"], report["margins"], report["prompts"]
    low, high = found["held_out_interval"]
    table(
        "Calibrated",
        ["", CAPACITY, ""],
        [
            ["target", shares(report["target"]), ""],
            ["calibration", shares(found["calibration"]), f"{prompts['calibration']} prompts"],
            [
                "held-out",
                shares(found["held_out"]),
                f"{prompts['held_out']} prompts, 95 % interval {low:.3f} .. {high:.3f}",
            ],
        ],
    )
    layer_bars(report)
    say()
    tau = report["tau"]
    _goal(report["goal"])
    one = f"tau {tau[0]:.6f} for all layers" if not report["per_layer"] else "tau as in the table"
    say(f"{one}, found in {report['evaluations']} passes over prompts")
    say(
        f"margins |score - tau|: min {margins['min']:.2g}, 5 % {margins['p05']:.2g}, "
        f"median {margins['median']:.2g}"
    )
    if other := report.get("data"):
        say(f"prompts: {console.shown(Path(other['source']))}", whole=True)
    for warning in report["warnings"]:
        say(f"warning: {warning}", WARNED)


def _goal(goal: dict[str, Any]) -> None:
    """What a goal other than a share came to."""
    if goal["kind"] == "speedup":
        say(
            f"goal: {goal['value']:.2f} times as fast as dense; expected {goal['expected']:.2f} in "
            f"{goal['phase']} {goal['batch']} x {goal['context']} ({goal['engine']})"
        )
    elif "held_out" in goal:
        name = {"max_kl": "KL", "max_ppl_increase": "rise of perplexity"}[goal["kind"]]
        say(
            f"goal: {name} at most {goal['value']:g}; calibration {goal['calibration']:.4f}, "
            f"held-out {goal['held_out']:.4f}"
        )


def layer_bars(calibration: dict[str, Any]) -> None:
    """Held-out capacity of every routed layer."""
    rows = []
    for row in calibration["layers"]:
        always = {"skip": "always skips", "execute": "always executes"}.get(row["constant"] or "")
        bar = console.bar(row["capacity"], 20)
        rows.append([str(row["layer"]), shares(row["capacity"]), bar, f"{row['tau']:.4f}", always])
    table(
        "Layers, held-out",
        [">layer", CAPACITY, "0                  1", ">tau", ""],
        [[cell or "" for cell in row] for row in rows],
    )


def exported(report: dict[str, Any], run: Path) -> None:
    """Where the graph is and what it took."""
    peak = f"{size(report['peak_rss_bytes'])}, {report['peak_memory_over_weights']:g} x weights"
    removed = console.ranges(report["static_removed"]) or "none"
    table(
        "Exported",
        ["", ""],
        [
            ["format", f"ONNX, opset {report['opset']}, IR {report['ir_version']}"],
            ["conditional attentions", str(report["if_nodes"])],
            ["size with peers", size(report["bytes"])],
            ["onnx.checker", report["checker"]],
            ["static peer lacks layers", removed],
            ["peak memory", peak],
            ["time", seconds(report["seconds"])],
        ],
    )
    say()
    say(console.shown(run / report["file"]), whole=True)


def built(report: dict[str, Any], run: Path) -> None:
    """What the engine is, and what its conditionals hold."""
    capabilities = ", ".join(report["compute_capabilities"])
    behind = report["behind_conditions"]
    table(
        "Built",
        ["", ""],
        [
            ["builder", report["builder"]],
            ["for compute capability", capabilities or "the GPU of its machine"],
            ["precision", report["precision"]],
            ["layers", str(report["layers"])],
            ["conditionals", str(report["conditions"])],
            ["products they can skip", f"{sum(behind.values())}, in {len(behind)} sublayers"],
            ["products outside", str(len(report["outside"]))],
            ["engine", size(report["bytes"])],
            *([name, size(count)] for name, count in report["peers"].items()),
            ["peak memory", size(report["peak_rss_bytes"])],
            ["time", seconds(report["seconds"])],
            ["executed", "not run: needs the GPU that it is for"],
        ],
    )
    say()
    say(console.shown(run / report["file"]), whole=True)


def repository(report: dict[str, Any], folder: Path) -> None:
    """What the repository holds, for which server, and what lint says of it."""
    graph = report["graph"]
    table(
        "Repository for Triton Inference Server",
        ["", ""],
        [
            ["release", f"{report['target']}, backend {report['backend']}"],
            ["graph", f"{graph['target']}, {graph['dtype']}, opset {graph['opset']}"],
            ["decode together", f"{report['sequences']} sequences"],
            ["longest sequence", f"{report['positions']} positions"],
            ["requests that may wait", str(report["queue"])],
            ["capacities on the dial", str(len(report["dial"]))],
        ],
    )
    linted(report)
    say()
    say(console.shown(folder), whole=True)


def linted(report: dict[str, Any]) -> None:
    """Faults of a repository, or that there are none, and how far that goes."""
    say()
    if "lint" in report:
        say(f"lint {report['lint']}")
        return
    for fault in report["faults"]:
        say(f"fault: {fault}")
    if not report["faults"]:
        say("lint: no faults")
    for words in dict.fromkeys(report["loaded"].values()):
        names = [name for name, each in report["loaded"].items() if each == words]
        say(f"{', '.join(names)}: {words}")


def _value(value: float | None) -> str:
    return "not run" if value is None else f"{value:.6g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def validated(report: dict[str, Any]) -> None:
    """Every gate with its limit, and the flips."""
    rows: list[list[str | Text]] = []
    for gate in report["gates"]:
        passed = gate["passed"]
        outcome = Text("not run", WARNED) if passed is None else verdict(passed)
        limit = f"{gate.get('comparison', '')} {_value(gate['limit'])}".strip()
        rows.append([gate["name"], _value(gate["value"]), limit, outcome])
    table(f"PyTorch against {report['engine']}", ["gate", ">value", ">limit", ""], rows)
    say()
    decisions, tokens = report["decisions"], report["tokens"]
    flips = decisions["flips"]
    margin = decisions.get("min_margin")
    nearest = "" if margin is None else f"; nearest score to tau: {margin:.2g}"
    say(f"{decisions.get('calls', 'all')} decisions, {len(flips)} flips{nearest}")
    for flip in flips[:5]:
        say("flip: " + ", ".join(f"{key} {value}" for key, value in flip.items()), WARNED)
    say(f"{tokens['prompts']} prompts, {tokens['steps']} greedy steps each")
    if report["laziness"] is None:
        say("not run: what a skip saves, which shows in TensorRT's plugin alone", WARNED)
    say(Text.assemble("validation ", verdict(report["status"] == "passed")))


def benched(report: dict[str, Any]) -> None:
    """A table a phase, times in ms."""
    for phase, unit in (("prefill", "ms a prompt batch"), ("decode", "ms a token")):
        rows = [
            [
                f"{row['batch']} x {row['context']}",
                shares(row["capacity"], 2),
                *(
                    milliseconds(row.get(f"{name}_ms"))
                    for name in ("dense", "routed", "execute", "skip", "static")
                ),
                f"{row['speedup']:.2f}x",
                f"±{row['spread']:.0%}",
                "-" if row["efficiency"] is None else f"{row['efficiency']:.0%}",
            ]
            for row in report["rows"]
            if row["phase"] == phase
        ]
        if rows:
            headings = [
                *(">batch x\ncontext", CAPACITY, ">dense", ">routed", ">exe-\ncute", ">skip"),
                *(">static", ">speed-\nup", ">", ">effi-\nciency"),
            ]
            table(f"{phase.capitalize()}, {unit}", headings, rows)
    say()
    repeats = sorted({row["repeats"] for row in report["rows"]})
    say(
        f"medians of {', '.join(map(str, repeats))} interleaved rounds; speedup: dense / routed; "
        "efficiency: time saved by skipping all / by removing all.",
        DIM,
    )
    if waits := report.get("waits"):
        counts = ", ".join(f"{name} {count}" for name, count in waits.items())
        say(f"waits of the host for the device in a decoding step: {counts}")
    if machine := report.get("machine"):
        say(f"{machine['cpu']}, {machine['cores']} cores, {machine['onnxruntime']}", DIM)


def profiled(report: dict[str, Any], most: int = 12) -> None:
    """A table a phase: ms by kind of node."""
    variants = ("dense", "execute", "skip")
    for phase, unit in (("prefill", "ms"), ("decode", "ms a token")):
        found = [row for row in report["rows"] if row["phase"] == phase]
        rows = [
            [row["kind"], *(f"{row[f'{name}_ms']:.2f}" for name in variants),
             *(str(row[f"{name}_nodes"]) for name in variants)]
            for row in found[:most]
        ]  # fmt: skip
        for label, some in (("others", found[most:]), ("all", found)):
            times = (f"{sum(row[f'{name}_ms'] for row in some):.2f}" for name in variants)
            nodes = (str(sum(row[f"{name}_nodes"] for row in some)) for name in variants)
            rows.append([label, *times, *nodes])
        headings = [">dense", ">execute", ">skip", ">nodes:\ndense", ">exe-\ncute", ">skip"]
        title = f"{phase.capitalize()}, {unit}, context {report['context']}"
        table(title, ["kind of node", *headings], rows)
    say()
    say(
        "means of profiled calls; profiling itself costs some microseconds a node. A conditional's "
        "time is without its branch's.",
        DIM,
    )


def evaluated(report: dict[str, Any]) -> None:
    """Quality of the methods side by side."""
    rows = [
        [
            row["method"],
            shares(row["capacity"]),
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.3f}",
            console.ranges(row["layers_removed"]),
        ]
        for row in report["rows"]
    ]
    title = f"Quality on {report['data']}: {report['prompts']} prompts, {report['tokens']} tokens"
    table(title, ["method", CAPACITY, ">KL", ">perplexity", "layers removed"], rows)
    say()
    if report["routed_over_static"] is not None:
        say(f"KL of routed / best static: {report['routed_over_static']:.3f}")
    say("KL: nats a token from the dense model; lower is closer", DIM)


def swept(report: dict[str, Any]) -> None:
    """KL by method and capacity."""
    rows = [
        [name, shares(point["capacity"]), f"{point['kl']:.4f}", f"{point['perplexity']:.3f}"]
        for name, points in report["series"].items()
        for point in points
    ]
    title = f"Quality against capacity: {report['prompts']} held-out prompts"
    table(title, ["method", CAPACITY, ">KL", ">perplexity"], rows)
    say()
    say(f"dense: KL 0, perplexity {report['dense_perplexity']:.3f}")


def summary(reports: dict[str, Any]) -> None:
    """A whole run in one table."""
    found, quality = reports["calibrate"]["capacity"], reports["eval"]
    low, high = found["held_out_interval"]
    dense, *_, ours = quality["rows"]
    best = min(
        (row for row in quality["rows"] if row["method"].startswith("static")),
        # With nothing in the place of what is removed.
        key=lambda row: ("rank" in row["method"], float(row["kl"])),
    )
    rows: list[list[str | Text]] = [
        ["capacity", capacity_words(found["held_out"]), f"95 % {low:.3f} .. {high:.3f}, held-out"],
        ["KL to dense", f"{ours['kl']:.4f}", f"{ours['method']}, nats a token"],
        ["  best static", f"{best['kl']:.4f}", best["method"]],
        [
            "perplexity",
            f"{ours['perplexity']:.3f}",
            f"dense {dense['perplexity']:.3f}, static {best['perplexity']:.3f}",
        ],
    ]
    rows += _engine(reports) if "validate" in reports else []
    table("The run", ["", "result", ""], rows)
    gates = reports["validate"]["gates"] if "validate" in reports else []
    failed = [gate["name"] for gate in gates if gate["passed"] is False]
    if failed:
        say()
        say(f"failed gates: {', '.join(failed)}", console.FAILED)


def _engine(reports: dict[str, Any]) -> list[list[str | Text]]:
    """Rows about the exported graph."""
    validation, tokens = reports["validate"], reports["validate"]["tokens"]
    passed = sum(gate["passed"] is True for gate in validation["gates"])
    rows: list[list[str | Text]] = [
        [
            "parity with PyTorch",
            verdict(validation["status"] == "passed"),
            f"{passed} of {len(validation['gates'])} gates",
        ],
        [
            "  decisions agree",
            f"{validation['decisions']['agreement']:.2%}",
            f"{len(validation['decisions']['flips'])} flips",
        ],
        [
            "  logits max abs",
            f"{validation['logits']['max_abs']:.2g}",
            "with decisions forced equal",
        ],
        [
            "  greedy tokens agree",
            f"{tokens['match']:.2%}",
            f"of {tokens['prompts']} prompts, {tokens['steps']} steps each",
        ],
    ]
    for row in reports["bench"]["rows"]:
        rows.append(
            [
                f"{row['phase']} {row['batch']} x {row['context']}",
                f"{row['speedup']:.2f}x dense",
                f"±{row['spread']:.0%}; all-skip "
                f"{row['execute_ms'] / row['skip_ms']:.2f}x all-execute",
            ]
        )
    return rows
