"""What an operator watches: names, kinds and meanings of the metrics, and where they go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, Protocol

METRICS: dict[str, tuple[Literal["counter", "gauge"], str, tuple[str, ...]]] = {
    "mskip_requests_total": ("counter", "Requests by how they ended.", ("outcome",)),
    "mskip_prompts_total": ("counter", "Prompts read.", ()),
    "mskip_tokens_total": ("counter", "Tokens read (prompt) and made (generated).", ("kind",)),
    "mskip_decisions_total": (
        *("counter", "Decisions of routed sublayers, one a request and layer."),
        ("layer", "decision"),
    ),
    "mskip_queue_seconds_total": ("counter", "Time that requests waited for a place.", ()),
    "mskip_prefill_seconds_total": ("counter", "Time in which prompts were read.", ()),
    "mskip_decode_seconds_total": ("counter", "Time in which tokens were made.", ()),
    "mskip_steps_total": ("counter", "Decoding steps, each of one token for all sequences.", ()),
    "mskip_capacity": ("gauge", "Executed share of all decisions so far, 0..1.", ()),
    "mskip_tokens_per_second": ("gauge", "Tokens made a second, over the last ten.", ()),
    "mskip_active_sequences": ("gauge", "Sequences that decode now.", ()),
    "mskip_queued_requests": ("gauge", "Requests that wait for a place.", ()),
    "mskip_kv_bytes": ("gauge", "Keys and values that are held.", ()),
    "mskip_kv_bytes_dense": ("gauge", "What the same sequences would hold, all executed.", ()),
    "mskip_kv_bytes_reserved": ("gauge", "What running sequences may come to hold.", ()),
    "mskip_kv_bytes_budget": ("gauge", "Most that may be reserved.", ()),
}
"""Kind, meaning and labels of each metric."""


class Meter(Protocol):
    """Takes measurements; see `METRICS` for the names."""

    def add(self, name: str, value: float, **labels: str) -> None:
        """Raise a counter."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""


class Tally:
    """Keeps measurements in memory.

    Attributes:
        values: by name and the values of its labels.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = defaultdict(float)

    def add(self, name: str, value: float, **labels: str) -> None:
        """See `Meter`."""
        self.values[name, *(labels[each] for each in METRICS[name][2])] += value

    def set(self, name: str, value: float) -> None:
        """See `Meter`."""
        self.values[name,] = value


class TritonMeter(Tally):
    """Gives measurements to Triton, whose metrics endpoint shows them, and keeps them too.

    Args:
        backend: the module triton_python_backend_utils.
        labels: of every metric, such as the model's name. Two meters with the same labels would
            write over each other's gauges.
    """

    def __init__(self, backend: Any, labels: dict[str, str]) -> None:
        super().__init__()
        self._labels = labels
        self._families = {
            name: backend.MetricFamily(
                name=name,
                description=meaning,
                kind=getattr(backend.MetricFamily, kind.upper()),
            )
            for name, (kind, meaning, _) in METRICS.items()
        }
        self._metrics: dict[tuple[str, ...], Any] = {}

    def _metric(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={**self._labels, **labels})
        return self._metrics[key]

    def add(self, name: str, value: float, **labels: str) -> None:
        """See `Meter`."""
        super().add(name, value, **labels)
        self._metric(name, labels).increment(value)

    def set(self, name: str, value: float) -> None:
        """See `Meter`."""
        super().set(name, value)
        self._metric(name, {}).set(value)


def report(tally: Tally) -> dict[str, Any]:
    """What was measured so far, for JSON.

    Returns:
        ``requests`` by how they ended; ``tokens`` by kind; ``tokens_per_second``; ``queue``,
        ``prefill`` and ``decode``, each with ``count`` (prompts, prompts, steps) and ``ns`` in
        all, as Triton's own statistics have them; ``active_sequences``; ``queued_requests``;
        ``kv_bytes``: ``held``, ``dense`` (the same sequences, all executed), ``reserved``,
        ``budget``; ``capacity``: executed share of all decisions, 1 before the first;
        ``layers``: of each routed layer that has decided, ``executed``, ``skipped`` and
        ``skip_rate``, 0..1.
    """
    # A copy: the scheduler goes on counting.
    values = tally.values.copy()

    def by_label(name: str) -> dict[str, int]:
        return {key[1]: int(value) for key, value in values.items() if key[0] == name}

    def phase(name: str, counted: str) -> dict[str, int]:
        seconds = values[f"mskip_{name}_seconds_total",]
        return {"count": int(values[counted,]), "ns": round(seconds * 1e9)}

    layers: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key[0] == "mskip_decisions_total":
            _, layer, decision = key
            counts = layers.setdefault(layer, {"executed": 0, "skipped": 0})
            counts["executed" if decision == "execute" else "skipped"] = int(value)
    for counts in layers.values():
        counts["skip_rate"] = counts["skipped"] / (counts["executed"] + counts["skipped"])
    return {
        "requests": by_label("mskip_requests_total"),
        "tokens": by_label("mskip_tokens_total"),
        "tokens_per_second": values["mskip_tokens_per_second",],
        "queue": phase("queue", "mskip_prompts_total"),
        "prefill": phase("prefill", "mskip_prompts_total"),
        "decode": phase("decode", "mskip_steps_total"),
        "active_sequences": int(values["mskip_active_sequences",]),
        "queued_requests": int(values["mskip_queued_requests",]),
        "kv_bytes": {
            "held": int(values["mskip_kv_bytes",]),
            **{
                name: int(values[f"mskip_kv_bytes_{name}",])
                for name in ("dense", "reserved", "budget")
            },
        },
        "capacity": values["mskip_capacity",],
        "layers": {layer: layers[layer] for layer in sorted(layers, key=int)},
    }
