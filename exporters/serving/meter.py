"""What an operator watches: names, kinds and meanings of the metrics, and where they go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, Protocol

METRICS: dict[str, tuple[Literal["counter", "gauge"], str, tuple[str, ...]]] = {
    "mskip_requests_total": ("counter", "Requests by how they ended.", ("outcome",)),
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


class TritonMeter:
    """Gives measurements to Triton, whose metrics endpoint shows them.

    Args:
        backend: the module triton_python_backend_utils.
        labels: of every metric, such as the model's name.
    """

    def __init__(self, backend: Any, labels: dict[str, str]) -> None:
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
        self._metric(name, labels).increment(value)

    def set(self, name: str, value: float) -> None:
        """See `Meter`."""
        self._metric(name, {}).set(value)
