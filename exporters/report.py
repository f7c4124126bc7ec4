"""The report of a run: one HTML file and its figures, views of the run's JSON.

The JSON files are the authority; nothing is measured or decided again here. A part that is not
there is reported as "not run" with the command that makes it, never left out.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from jinja2 import ChainableUndefined, Environment, Undefined
from markupsafe import Markup

from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, whole_file, write_text
from mskip.exporters import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Input(NamedTuple):
    """A JSON file of the run, the command that writes it, and the form that the report needs.

    In ``shape`` a mapping lists the keys that are looked into, a list has one item that stands
    for all, and `_N` is a finite number. Everything may be null or missing.
    """

    path: str
    command: str
    shape: Mapping[str, Any]


_N = 0.0
_TIMES = ("dense_ms", "execute_ms", "routed_ms", "skip_ms", "static_ms")
_BENCH = ("batch", "context", "capacity", "speedup", "efficiency", "overhead", "spread", *_TIMES)
_BENCH_SHAPE = {"rows": [dict.fromkeys(_BENCH, _N)]}
_TUNE_SHAPE = {
    "target": _N,
    "trace": [{"step": _N, "capacity": _N}],
    "sensitivity": {"layers": [_N], "kl": [_N], "cosine": [_N]},
    "targets": [{"target": _N, "capacity": _N, "trace": [_N]}],
    "worth": {
        "static_kl": _N,
        "routed_kl": _N,
        "static_capacity": _N,
        "routed_capacity": _N,
        "removed": [_N],
        "difference_interval": [_N],
    },
}
_CALIBRATION_SHAPE = {
    "target": _N,
    "tau": [_N],
    "capacity": {"calibration": _N, "held_out": _N, "held_out_interval": [_N]},
    "layers": [{"tau": _N, "capacity": _N, "scores": [_N]}],
    "warnings": [],
}
_EVAL_SHAPE = {
    "rows": [{"capacity": _N, "kl": _N, "layers_removed": [_N]}],
    "routed_over_static": _N,
}
_TASKS_SHAPE = {"capacity": _N, "tasks": {}, "average": {"value": _N, "stderr": _N}}
_VALIDATE_SHAPE = {"gates": [{}], "decisions": {"flips": [{}]}}
_TENSORRT_SHAPE = {
    "bytes": _N,
    "compute_capabilities": [],
    "behind_conditions": {},
    "outside": [],
}
_INPUTS = {
    "router": _Input("router_config.json", "mskip tune", {"base_model": {}, "layers": [_N]}),
    "tune": _Input("reports/tune.json", "mskip tune", _TUNE_SHAPE),
    "calibration": _Input("calibration.json", "mskip calibrate", _CALIBRATION_SHAPE),
    "eval": _Input("reports/eval.json", "mskip eval", _EVAL_SHAPE),
    "validate": _Input("reports/validate.json", "mskip validate", _VALIDATE_SHAPE),
    "bench": _Input("reports/bench.json", "mskip bench", _BENCH_SHAPE),
    "export": _Input("reports/export.json", "mskip export", {"bytes": _N}),
    "tensorrt": _Input("reports/tensorrt.json", "mskip export --trt", _TENSORRT_SHAPE),
    "engine_validate": _Input(
        "reports/validate-engine.json", "mskip validate --trt", _VALIDATE_SHAPE
    ),
    "engine_bench": _Input("reports/bench-engine.json", "mskip bench --trt", _BENCH_SHAPE),
    "sweep": _Input("reports/sweep.json", "mskip sweep", {"series": {}, "dense_perplexity": _N}),
    "tasks": _Input("reports/tasks.json", "mskip eval --tasks paper", {"rows": [_TASKS_SHAPE]}),
}
_FIGURES = ("quality", "sweep", "capacity", "scores", "constraint", "sensitivity", "latency")
_TOLERANCE = 0.05  # how far the reached capacity may lie from its target


class _Tile(NamedTuple):
    """One headline: what was measured, and the verdict in a word (``state`` only colours it)."""

    title: str
    value: str
    verdict: str
    state: str
    notes: list[str]


def write_report(run: Path) -> Path:
    """Write ``reports/report.html`` and the PNGs beside it, from what the run folder holds.

    Returns:
        The path of the HTML, a single file that refers to nothing outside itself.

    Raises:
        ArtifactError: no recipe, a file that is not of its form, or a folder that is read-only.
    """
    recipe, data = _read(run)
    figures = _write_figures(run, data)
    path = run / "reports" / "report.html"
    name = recipe.get("name") or run.resolve().name
    write_text(path, _render({**recipe, "name": name}, data, figures))
    return path


def write_plots(run: Path) -> list[Path]:
    """Write the figures of a run as ``reports/*.png``; a figure without data is removed.

    Raises:
        ArtifactError: as `write_report`.
    """
    _, data = _read(run)
    return [run / "reports" / f"{name}.png" for name in _write_figures(run, data)]


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe, and each input's JSON or None, checked as far as the report looks into it."""
    path = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}.", "Give a run folder, made by: mskip tune"
        ) from error
    # As in mskip.compressor.recipe: PyYAML lets bare errors out for bad bytes and odd tags.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid YAML: {error}.") from error
    _check(recipe, {"model": {}, "routing": {"capacity": _N}}, str(path))
    data: dict[str, Any] = {}
    for name, source in _INPUTS.items():
        path = run / source.path
        remedy = f"Write it again with: {source.command}"
        data[name] = read_json(path, name, remedy) if path.exists() else None
        if path.exists():
            _check(data[name], source.shape, str(path), remedy)
    return recipe, data


def _check(value: object, shape: object, where: str, remedy: str = "") -> None:
    """Raise ArtifactError where ``value`` is not of ``shape`` (see `_Input`)."""
    wanted = ""
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            wanted = "a mapping"
        else:
            for key, inner in shape.items():
                if value.get(key) is not None:
                    _check(value[key], inner, f"{where}: {key}", remedy)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            wanted = "a list"
        else:
            for number, item in enumerate(value):
                if shape and (item is not None or isinstance(shape[0], Mapping)):
                    _check(item, shape[0], f"{where}[{number}]", remedy)
    elif not isinstance(value, int | float) or not math.isfinite(value):
        wanted = "a finite number"
    if wanted:
        raise ArtifactError(f"{where} is not {wanted}.", remedy)


def _at(data: object, *keys: str) -> Any:
    """The value at nested keys, or None where any is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _write_figures(run: Path, data: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Write the PNGs; return name -> ``uri`` (the image inline) and ``alt``."""
    written = {}
    for name, figure, alt in _figures(data):
        image = plots.to_png(figure)
        with whole_file(run / "reports" / f"{name}.png") as temporary:
            temporary.write_bytes(image)
        uri = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
        written[name] = {"uri": uri, "alt": alt}
    for name in _FIGURES:
        if name not in written:  # else the picture of a result that is gone would stay
            (run / "reports" / f"{name}.png").unlink(missing_ok=True)
    return written


def _figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure, str]]:
    """Name, figure and alternative text of every figure that has data."""
    if rows := _at(data, "eval", "rows"):
        values = ", ".join(f"{row.get('method')} {_number(row.get('kl'))}" for row in rows)
        yield "quality", plots.quality(rows), f"Bars of KL from dense in nats per token: {values}."
    if series := _at(data, "sweep", "series"):
        ends = ", ".join(f"{name}: {len(points)} points" for name, points in series.items())
        yield "sweep", plots.tradeoff(series), f"Lines of KL from dense against capacity. {ends}."
    if layers := _at(data, "calibration", "layers"):
        known = [row["capacity"] for row in layers if row.get("capacity") is not None]
        ends = " to ".join(_capacity(end(known, default=None)) for end in (min, max))
        figure = plots.layer_capacity(layers, _at(data, "calibration", "target"))
        yield "capacity", figure, f"Bars of held-out capacity by decoder layer, from {ends}."
        if any(row.get("scores") for row in layers):
            alt = f"Histograms of held-out scores of {len(layers)} layers, each with a line at tau."
            yield "scores", plots.scores(layers), alt
    if runs := _traces(data["tune"]):
        ends = ", ".join(_capacity(run["target"]) for run in runs)
        alt = f"Lines of capacity against optimiser step for the targets {ends}."
        yield "constraint", plots.constraint(runs), alt
    effect = _at(data, "tune", "sensitivity") or {}
    if layers := effect.get("layers"):
        figure = plots.sensitivity(layers, effect.get("kl") or [], effect.get("cosine") or [])
        alt = "Bars by decoder layer of KL from dense and of 1 - cosine when it is skipped alone."
        yield "sensitivity", figure, alt
    if rows := _at(data, "bench", "rows"):
        alt = "Lines of ms against context: dense, execute, routed, skip, static; as in the tables."
        yield "latency", plots.latency(rows), alt


def _traces(tune: Any) -> list[dict[str, Any]]:
    """Traces to draw: those of the targets, and the run's own where they do not hold it."""
    runs = [run for run in _at(tune, "targets") or [] if run.get("trace")]
    main = _at(tune, "target")
    own = [step.get("capacity") for step in _at(tune, "trace") or []]
    if own and main not in [run.get("target") for run in runs]:
        runs.insert(0, {"target": main, "trace": own})
    return [{"target": run.get("target"), "trace": run["trace"]} for run in runs]


def _tiles(data: dict[str, Any]) -> list[_Tile]:
    """The four headlines."""
    return [
        _capacity_tile(data["calibration"]),
        _quality_tile(data["eval"]),
        _parity_tile(data["validate"]),
        _speed_tile(data["bench"]),
    ]


def _capacity_tile(calibration: Any) -> _Tile:
    title = "Held-out capacity (skip rate)"
    target, reached = _at(calibration, "target"), _at(calibration, "capacity", "held_out")
    if target is None or reached is None:
        return _not_run(title, "calibration")
    good = _within(target, reached)
    notes = [f"target {_capacity(target)}", f"off by {reached - target:+.3f}"]
    verdict = f"{'within' if good else 'not within'} {_TOLERANCE} of target"
    return _Tile(title, _capacity(reached), verdict, "good" if good else "bad", notes)


def _quality_tile(evaluation: Any) -> _Tile:
    title = "KL, routed / best static"
    rows = [row for row in _at(evaluation, "rows") or [] if row.get("kl") is not None]
    # The run itself comes last; the yardstick is static removal with nothing in its place.
    routed = [row for row in rows[-1:] if not str(row.get("method")).startswith("static")]
    static = [
        row
        for row in rows
        if str(row.get("method")).startswith("static") and "rank" not in row["method"]
    ]
    ratio = _at(evaluation, "routed_over_static")
    if ratio is None or not routed or not static:
        return _not_run(title, "eval")
    notes = [
        f"{row['method']}: {_number(row['kl'])} nats at capacity {_capacity(row.get('capacity'))}"
        for row in (routed[0], min(static, key=lambda row: float(row["kl"])))
    ]
    verdict, state = ("closer to dense", "good") if ratio < 1 else ("no closer to dense", "bad")
    return _Tile(title, _times(ratio), f"{verdict} than static", state, notes)


def _parity_tile(validation: Any) -> _Tile:
    title = "Parity with PyTorch"
    status = _at(validation, "status")
    if status is None:
        return _not_run(title, "validate")
    gates = _at(validation, "gates") or []
    count = [sum(gate.get("passed") is outcome for gate in gates) for outcome in (True, False)]
    verdict = f"gates: {count[0]} passed, {count[1]} failed, {len(gates) - sum(count)} not run"
    flips, agreement = (_at(validation, "decisions", key) for key in ("flips", "agreement"))
    notes = [
        _number(_at(validation, "engine")),
        f"decisions agree: {_exact(agreement)}; "
        f"flips: {_number(None if flips is None else len(flips))}",
        f"logits, decisions forced equal: max abs {_number(_at(validation, 'logits', 'max_abs'))}",
    ]
    state = {"passed": "good", "failed": "bad"}.get(str(status), "mixed")
    return _Tile(title, str(status), verdict, state, notes)


def _speed_tile(bench: Any) -> _Tile:
    title = "Speedup, dense / routed"
    rows = [row for row in _at(bench, "rows") or [] if row.get("speedup") is not None]
    if not rows:
        return _not_run(title, "bench")
    speedups = [row["speedup"] for row in rows]
    faster = sum(speedup > 1 for speedup in speedups)
    state = "good" if faster == len(rows) else "mixed" if faster else "bad"
    capacities = sorted({row["capacity"] for row in rows if row.get("capacity") is not None})
    notes = [f"at capacity {', '.join(map(_capacity, capacities)) or 'not run'}"]
    if known := [row["efficiency"] for row in rows if row.get("efficiency") is not None]:
        notes.append(f"efficiency {_percent(min(known))} to {_percent(max(known))}")
    if known := [row["spread"] for row in rows if row.get("spread") is not None]:
        notes.append(f"spread of the repeats at most {_spread(max(known))}")
    value = f"{_times(min(speedups))} to {_times(max(speedups))}"
    return _Tile(title, value, f"faster in {faster} of {len(rows)} cases", state, notes)


def _not_run(title: str, name: str) -> _Tile:
    return _Tile(title, "not run", _INPUTS[name].command, "none", [])


def _within(target: float, reached: float) -> bool:
    return abs(reached - target) <= _TOLERANCE + 1e-9  # 0.55 - 0.5 is a little above 0.05


def _number(value: Any) -> str:
    """Three significant digits; whole numbers whole."""
    if value is None or isinstance(value, Undefined):
        return "not run"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or value == 0 or not math.isfinite(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _formatted(text: str) -> Any:
    """A template filter that fills ``text``, a format of one number."""

    def apply(value: Any) -> str:
        known = isinstance(value, int | float)
        return text.format(value) if known else _number(value)

    return apply


_share, _times, _percent = map(_formatted, ("{:.3f}", "{:.2f}×", "{:.0%}"))
_spread = _formatted("{:.1%}")
_signed, _hundred = map(_formatted, ("{:+.4f}", "{:.1%}"))
_exact = _formatted("{:.6g}")  # for what is held against a limit: 0.9998 must not read 1.00


def _skip_rate(capacity: Any) -> str:
    """1 - capacity as printed, so that the two add up to 1 on the page."""
    known = isinstance(capacity, int | float)
    return f"{1 - round(capacity, 3):.3f}" if known else _number(capacity)


def _capacity(value: Any) -> str:
    known = isinstance(value, int | float)
    return f"{_share(value)} (skip rate {_skip_rate(value)})" if known else _number(value)


def _ranges(numbers: Any) -> str:
    """Ascending integers in words and their count: 3, 5–7 (4)."""
    if not isinstance(numbers, list) or None in numbers:
        return _number(None)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{words} ({len(numbers)})" if words else "none"


def _render(
    recipe: dict[str, Any], data: dict[str, Any], figures: dict[str, dict[str, str]]
) -> str:
    missing = Markup('<span class="missing">not run</span>')

    def shown(value: Any) -> Any:
        absent = value is None or isinstance(value, Undefined) or value == "not run"
        return missing if absent else value

    # Chainable: a part that is missing is "not run" however deep the template looks into it.
    environment = Environment(
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=_number,
        share=_share,
        skip=_skip_rate,
        cap=_capacity,
        times=_times,
        percent=_percent,
        spread=_spread,
        signed=_signed,
        hundred=_hundred,
        exact=_exact,
        fixed=_formatted("{:.6f}"),
        ranges=_ranges,
    )
    environment.globals["not_run"] = missing
    environment.tests["within"] = _within
    template = (resources.files("mskip.exporters") / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        recipe=recipe, figures=figures, inputs=_INPUTS, tiles=_tiles(data), **data
    )
