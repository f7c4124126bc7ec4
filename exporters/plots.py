"""The report's figures: plain data in, a matplotlib `Figure` out.

Nothing here reads a file or touches pyplot, so no figure outlives its caller and no display is
needed. matplotlib is imported when a figure is drawn. Colours are Okabe and Ito's, which remain
apart for the colour-blind; each also has its own marker, hatch or label. Numbers that are None
were not run and leave a gap.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_INK, _GREY, _PALE = "#333333", "#767676", "#E4E7EB"
_WIDTH = 8.4  # inches; one size for all, so that text has one size on the page
_LATENCIES = (  # key, label, colour, marker, line style
    ("dense_ms", "dense", _INK, "s", "-"),
    ("execute_ms", "execute (all)", _RED, "^", ":"),
    ("routed_ms", "routed", _BLUE, "o", "-"),
    ("skip_ms", "skip (all)", _GREEN, "v", ":"),
    ("static_ms", "static (as many removed)", _ORANGE, "D", "--"),
)
_GATES = {  # the label, the colour and the hatch of a gate by what it does on every prompt
    None: ("depends on the prompt", _BLUE, ""),
    "execute": ("constant: execute", _ORANGE, "///"),
    "skip": ("constant: skip", _GREY, "..."),
}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def quality(rows: Sequence[Row]) -> Figure:
    """KL from the dense model, one bar a method.

    Args:
        rows: ``method``, ``capacity`` (0..1) and ``kl`` (nats a token).
    """
    figure = _figure(0.7 + 0.45 * len(rows))
    axes = _styled(figure.add_subplot())
    # The run itself comes last.
    colours = [_BLUE if row is rows[-1] else _GREY for row in rows]
    values = [_number(row.get("kl")) for row in rows]
    bars = axes.barh(range(len(rows)), values, height=0.62, color=colours)
    labels = ["not run" if row.get("kl") is None else f"{row['kl']:.3g}" for row in rows]
    axes.bar_label(bars, labels=labels, padding=4, fontsize=9, color=_INK)
    axes.set_yticks(range(len(rows)), [f"{_plain(row.get('method'))}\n{_at(row)}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=_PALE)
    axes.set_xlabel("KL from dense, nats per token (smaller is better)", fontsize=9)
    return figure


def tradeoff(series: Mapping[str, Sequence[Row]]) -> Figure:
    """KL from the dense model against capacity, one line a method.

    Args:
        series: by method the points, each with ``capacity`` (0..1) and ``kl`` (nats a token).
    """
    figure = _figure(3.6)
    axes = _styled(figure.add_subplot())
    # Static removal dashed and in quiet colours, routing solid.
    looks = {
        "static": iter(((_GREY, "s", "--"), (_ORANGE, "D", "--"))),
        "routed": iter(((_BLUE, "o", "-"), (_GREEN, "^", "-"))),
    }
    for name, points in series.items():
        known = [point for point in points if point.get("capacity") is not None]
        ordered = sorted(known, key=lambda point: float(point["capacity"]))
        kind = "routed" if name.startswith("routed") else "static"
        colour, marker, line = next(looks[kind], (_PURPLE, "v", ":"))
        axes.plot(
            [_number(point.get("capacity")) for point in ordered],
            [_number(point.get("kl")) for point in ordered],
            color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.4, label=name,
        )  # fmt: skip
    axes.plot([1.0], [0.0], color=_INK, marker="*", markersize=10, linestyle="", label="dense")
    axes.grid(color=_PALE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(
        "capacity: executed share of routed calls (skip rate = 1 - capacity)", fontsize=9
    )
    axes.set_ylabel("KL from dense, nats per token", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    return figure


def layer_capacity(layers: Sequence[Row], target: float | None = None) -> Figure:
    """Held-out capacity of each routed layer, with the constant gates marked.

    Args:
        layers: ``layer``, ``capacity`` (0..1) and ``constant`` (None, "execute" or "skip").
        target: the capacity that was asked for, drawn as a line.
    """
    from matplotlib.patches import Patch

    figure = _figure(2.9)
    axes = _styled(figure.add_subplot())
    handles: list[Any] = []
    for kind, (label, colour, hatch) in _GATES.items():
        places = [place for place, row in enumerate(layers) if row.get("constant") == kind]
        if not places:
            continue
        # The whole height is the layer's calls; what is not executed stays pale. Only a constant
        # skip hatches it, having no bar of its own to show.
        skip = kind == "skip"
        pale: Row = {"facecolor": _PALE, "edgecolor": colour, "linewidth": 0}
        full: Row = {"facecolor": colour, "edgecolor": "white", "linewidth": 0}
        axes.bar(places, 1, width=0.74, hatch=hatch if skip else "", **pale)
        heights = [_number(layers[place].get("capacity")) for place in places]
        axes.bar(places, heights, width=0.74, hatch=hatch, **full)
        handles.append(Patch(label=label, hatch=hatch, **(pale if skip else full)))
    if target is not None:
        label = f"target {target:.3f} (skip rate {1 - target:.3f})"
        handles.append(axes.axhline(target, color=_INK, linestyle="--", linewidth=1.2, label=label))
    _capacity_axis(axes)
    axes.set_xticks(range(len(layers)), [str(row.get("layer")) for row in layers])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("decoder layer", fontsize=9)
    _legend_above(figure, handles)
    return figure


def scores(layers: Sequence[Row]) -> Figure:
    """Histogram of held-out scores, one panel a layer, cut at tau.

    Args:
        layers: ``layer``, ``tau``, ``constant`` and ``scores`` (0..1, one a prompt).
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = 4
    height = -(-len(layers) // columns)
    figure = _figure(0.75 + 1.15 * height)
    grid = list(figure.subplots(height, columns, sharex=True, squeeze=False).flat)
    known = [v for row in layers for v in (*(row.get("scores") or ()), row.get("tau"))]
    known = [value for value in known if value is not None] or [0.0, 1.0]
    pad = 0.04 * (max(known) - min(known)) or 0.01
    low, high = min(known) - pad, max(known) + pad
    width = (high - low) / 24
    for axes, row in zip(grid, layers, strict=False):
        _styled(axes)
        values = [value for value in row.get("scores") or () if value is not None]
        tau = row.get("tau")
        # The edges are counted from tau, so that no bar stands on both sides of it.
        start = low if tau is None else tau
        steps = range(-math.ceil((start - low) / width), math.ceil((high - start) / width) + 1)
        edges = [start + step * width for step in steps]
        if tau is None:
            axes.hist(values, bins=edges, color=_GREY)
        else:
            parts = [[v for v in values if v >= tau], [v for v in values if v < tau]]
            axes.hist(parts, bins=edges, stacked=True, color=[_BLUE, _ORANGE])
            axes.axvline(tau, color=_INK, linestyle="--", linewidth=1.1)
        top = int(axes.get_ylim()[1])
        axes.set_yticks([0, top] if values else [0])
        axes.tick_params(labelsize=8)
        constant = row.get("constant")
        title = f"layer {row.get('layer')}" + (f" ({_plain(constant)})" if constant else "")
        axes.set_title(title if values else f"{title}: not run", fontsize=8.5, loc="left", pad=3)
    for axes in grid[len(layers) :]:
        axes.set_axis_off()
    figure.supxlabel("score of a held-out prompt", fontsize=9)
    figure.supylabel("prompts", fontsize=9)
    handles = [
        Patch(color=_ORANGE, label="skip (score < tau)"),
        Patch(color=_BLUE, label="execute (score ≥ tau)"),
        Line2D([], [], color=_INK, linestyle="--", label="tau"),
    ]
    _legend_above(figure, handles)
    return figure


def constraint(runs: Sequence[Row]) -> Figure:
    """Capacity against optimiser step, one line and one dashed target a run.

    Args:
        runs: ``target`` (0..1) and ``trace`` (capacity after each step).
    """
    figure = _figure(3.2)
    axes = _styled(figure.add_subplot())
    colours = (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _GREY)
    for number, run in enumerate(runs):
        colour, marker = colours[number % len(colours)], "osDv^P"[number % 6]
        trace = [_number(value) for value in run.get("trace") or ()]
        target = run.get("target")
        label = None
        if target is not None:
            label = f"target {target:.3f} (skip rate {1 - target:.3f})"
            axes.axhline(target, color=colour, linestyle="--", linewidth=1)
        axes.plot(
            range(1, len(trace) + 1),
            trace,
            color=colour,
            linewidth=1.8,
            marker=marker,
            markersize=4.5,
            markevery=max(1, len(trace) // 12),
            label=label,
        )
    _capacity_axis(axes)
    axes.grid(axis="y", color=_PALE)
    axes.set_xlabel("optimiser step (dashed: the target)", fontsize=9)
    _legend_above(figure, axes.get_legend_handles_labels()[0], columns=3)
    return figure


def sensitivity(
    layers: Sequence[int], kl: Sequence[float | None], cosine: Sequence[float | None]
) -> Figure:
    """What skipping one layer alone does: KL from dense, and 1 - cosine of the hidden state.

    Args:
        layers: indices of the routed layers.
        kl: nats per token, one a layer.
        cosine: similarity of the hidden state before and after the sublayer, one a layer.
    """
    figure = _figure(3.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    distance = [None if value is None else 1 - value for value in cosine]
    for axes, values, colour, label in (
        (upper, kl, _BLUE, "KL from dense,\nnats per token"),
        (lower, distance, _ORANGE, "1 − cosine"),
    ):
        _styled(axes)
        # A measure that is shorter than the list of layers leaves the rest out, not the figure.
        places = range(min(len(layers), len(values)))
        axes.bar(places, [_number(values[place]) for place in places], width=0.74, color=colour)
        axes.set_ylabel(label, fontsize=9)
        axes.grid(axis="y", color=_PALE)
    lower.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    lower.tick_params(axis="x", length=0)
    lower.set_xlabel("decoder layer skipped alone", fontsize=9)
    return figure


def latency(rows: Sequence[Row]) -> Figure:
    """Milliseconds against context, one panel for each phase, engine, batch and capacity.

    Args:
        rows: ``phase``, ``engine``, ``batch``, ``context``, ``capacity`` and the ``*_ms`` of
            dense, routed, execute, skip and static.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row.get(key) for key in _PANEL), []).append(row)
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure = _figure(0.7 + 2.5 * height)
    grid = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, ((phase, engine, batch, _), group) in zip(grid, panels.items(), strict=False):
        _styled(axes)
        group.sort(key=lambda row: row.get("context") or 0)
        contexts = [row.get("context") or 1 for row in group]
        for key, label, colour, marker, line in _LATENCIES:
            values = [_number(row.get(key)) for row in group]
            axes.plot(
                contexts,
                values,
                label=label,
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=1.6,
                markersize=5,
                markerfacecolor="white" if line == ":" else colour,
            )
        # Logarithmic both ways: equal distances are equal ratios, at 128 tokens as at 2048.
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08)
        if any((row.get(key) or 0) > 0 for row in group for key, *_ in _LATENCIES):
            axes.set_yscale("log")
            bottom, top = axes.get_ylim()
            ticks = (1, 2, 5) if top > 8 * bottom else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
            axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=20))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(color=_PALE)
        axes.set_xlabel("context, tokens", fontsize=9)
        axes.set_ylabel("ms", fontsize=9)
        title = f"{_plain(phase)}, batch {batch}, {_plain(engine)}\n{_at(group[0])}"
        axes.set_title(title, fontsize=9, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend_above(figure, grid[0].get_legend_handles_labels()[0])
    return figure


_PANEL = ("phase", "engine", "batch", "capacity")


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # without it savefig asks the user's backend
    return figure


def _styled(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_axisbelow(True)
    return axes


def _capacity_axis(axes: Axes) -> None:
    """Capacity on the left, the skip rate it leaves on the right."""
    axes.set_ylim(0, 1.001)
    axes.set_ylabel("capacity", fontsize=9)
    right = axes.secondary_yaxis("right", functions=(_complement, _complement))
    right.set_ylabel("skip rate", fontsize=9)
    right.tick_params(labelsize=9, colors=_INK)
    right.spines["right"].set_color(_GREY)


def _complement(value: Any) -> Any:
    return 1 - value


def _legend_above(figure: Figure, handles: Sequence[Any], columns: int = 5) -> None:
    """Above the panels, where it covers no data."""
    if handles:
        place: Row = {"loc": "outside upper left", "ncols": columns}
        figure.legend(handles=list(handles), frameon=False, fontsize=9, **place)


def _number(value: float | None) -> float:
    """matplotlib's gap for what was not run."""
    return float("nan") if value is None else value


def _plain(text: object) -> str:
    """Text from a file, with the dollar sign kept from starting mathematics."""
    return str(text).replace("$", r"\$")


def _at(row: Row) -> str:
    capacity = row.get("capacity")
    if capacity is None:
        return ""
    return f"capacity {capacity:.3f} (skip rate {1 - capacity:.3f})"
