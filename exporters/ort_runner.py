"""ONNX Runtime on the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mskip.compressor.errors import ArtifactError, MissingExtraError
from mskip.exporters.contract import CONTRACT, UNSCORED, read_contract
from mskip.exporters.onnx_export import MODEL
from mskip.exporters.runner import (
    Floats,
    Ints,
    Runner,
    State,
    cache_rows,
    positions,
    selected,
)


def contract_path(folder: Path, file: str) -> Path:
    """The contract of a graph of an export."""
    return folder / (CONTRACT if file == MODEL else file.replace(".onnx", ".contract.json"))


def runtime() -> Any:
    """The module onnxruntime.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None
    return onnxruntime


class OrtRunner(Runner):
    """Runs an exported graph, routed or static, on ONNX Runtime's CPU provider.

    Args:
        folder: of the export.
        file: which graph in it; its contract lies beside it.
        threads: intra-op threads; None leaves them to the runtime.
        profile: prefix of a profile that `end_profile` completes; None for none.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ArtifactError: no such export, or one that the runtime refuses.
    """

    def __init__(
        self,
        folder: Path,
        file: str = MODEL,
        *,
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        onnxruntime = runtime()
        self.contract = read_contract(contract_path(folder, file))
        if not (folder / file).is_file():
            raise ArtifactError(f"no graph at {folder / file}.", "Make it with: mskip export")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Idle threads of a session go on spinning for some 60 ms after a call, and take the cores
        # from whichever session is called next: two that took turns were half as fast.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own classes have no common base.
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"ONNX Runtime {onnxruntime.__version__} refuses {folder / file}: {reason}",
                "Export again, or install the onnxruntime that mskip asks for.",
            ) from error
        # What really runs, not what could: the GPU wheel lists CUDA on any machine.
        self.name = f"onnxruntime {onnxruntime.__version__} {self.session.get_providers()[0]}"
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._outputs = [spec.name for spec in self.contract.outputs()]

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`."""
        new = input_ids.shape[1]
        arrays: dict[str, Any] = {
            "input_ids": np.ascontiguousarray(input_ids),
            "attention_mask": np.ascontiguousarray(mask),
            "position_ids": positions(mask, new),
        }
        if self.contract.routed_layers:
            arrays["routing"] = np.ascontiguousarray(routing)
            arrays["tau"] = tau
        # An OrtValue borrows the array's memory without holding it: `arrays` must
        # outlive the call.
        feeds = {name: self._value(array) for name, array in arrays.items()}
        feeds.update(self._empty(len(input_ids)) if cache is None else cache)
        values = dict(
            zip(
                self._outputs,
                self.session.run_with_ort_values(self._outputs, feeds),
                strict=True,
            )
        )
        logits = values.pop("logits").numpy().astype(np.float32, copy=False)
        if self.contract.routed_layers:
            decided = values.pop("routing_out").numpy()
            scores = values.pop("routing_scores").numpy().copy()
            scores[(routing != -1) | (scores == UNSCORED)] = np.nan
        else:
            decided, scores = routing, np.zeros(routing.shape, dtype=np.float32)
        past = {name.replace("present", "past_key_values"): v for name, v in values.items()}
        return State(logits, decided, scores, mask, past)

    def _empty(self, batch: int) -> dict[str, Any]:
        shape = (batch, self.contract.kv_heads, 0, self.contract.head_dim)
        empty = self._value(np.zeros(shape, dtype=self.contract.dtype))
        return {
            f"past_key_values.{layer}.{part}": empty
            for layer in self.contract.cached_layers
            for part in ("key", "value")
        }

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        cache = {}
        for layer in self.contract.cached_layers:
            taken = cache_rows(self.contract, layer, state.routing, rows)
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                cache[name] = self._value(state.cache[name].numpy()[taken])
        return selected(state, rows, cache)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        size = np.dtype(self.contract.dtype).itemsize
        return sum(int(np.prod(value.shape())) * size for value in state.cache.values())

    def end_profile(self) -> Path:
        """Close the profile and return its file (JSON)."""
        return Path(self.session.end_profiling())
