"""Exporting a run to ONNX: the conditional graph, its peers, contract and tokenizer.

The dense graph and the static ones come from the same trace and share the
weight file, so that comparing them compares routing and nothing else.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mskip.compressor.artifact import Run, load_routers, routers_hash, saved_orders
from mskip.compressor.baselines import kept_count
from mskip.compressor.errors import ModelError
from mskip.compressor.files import sha256, whole_folder
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import require_unit
from mskip.exporters.attention_inputs import has_tables
from mskip.exporters.bodies import body_weights
from mskip.exporters.buffer_builder import OPSET as BUFFER_OPSET
from mskip.exporters.buffered import ROOM
from mskip.exporters.contract import CONTRACT, WITH_CAPACITY, Contract, Target
from mskip.exporters.fused import OPSET as FUSED_OPSET
from mskip.exporters.lowering import routed_graph, static_graph
from mskip.exporters.packing import own_weights
from mskip.exporters.targets import PORTABLE, Form
from mskip.exporters.tracing import trace

MODEL, DENSE, STATIC, CEILING = "model.onnx", "dense.onnx", "static.onnx", "ceiling.onnx"
DATA = "model.onnx.data"


CONTEXT = 4096
"""Positions that a sequence can have where the graph fixes their number, if nothing is said."""
_LEAST_OPSET: dict[Target, int] = {
    "ort": FUSED_OPSET,
    **dict.fromkeys(WITH_CAPACITY, BUFFER_OPSET),
}


def contract_of(
    base: BaseModel,
    routers: Routers,
    tau: list[float],
    opset: int,
    form: Form = PORTABLE,
    context: int = CONTEXT,
) -> Contract:
    """The contract of a model's routed graph.

    Args:
        base: the model.
        routers: its routers.
        tau: of each.
        opset: at least so new.
        form: of the graph.
        context: positions of a sequence, where the graph fixes them (targets for TensorRT).
    """
    config = base.model.config.get_text_config()
    ends = base.model.generation_config.eos_token_id
    kv_heads, head_dim = _cached_shape(base)
    return Contract(
        layers=config.num_hidden_layers,
        routed_layers=routers.layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        dtype=str(base.model.dtype).removeprefix("torch."),
        opset=max(opset, _LEAST_OPSET.get(form.target, 0)),
        tau=tau,
        eos=ends if isinstance(ends, list) else [] if ends is None else [ends],
        pad=int(base.tokenizer.pad_token_id),
        removed_layers=[],
        granularity=routers.sublayers.granularity,
        compensation_rank=routers.sublayers.compensation_rank,
        target=form.target,
        weights=form.weights,
        capacity=context if form.target in WITH_CAPACITY else 0,
        positions=_positions(base) if form.target == "ort" else 0,
    )


def _positions(base: BaseModel) -> int:
    """Of the model, and some beyond: a prompt that fills it can be answered all the same."""
    known = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return known + ROOM if known else 0


@torch.no_grad()
def _cached_shape(base: BaseModel) -> tuple[int, int]:
    """Heads and width of a cached key: what the model caches, which its configuration only hints.

    Raises:
        ModelError: layers differ, or keys from values.
    """
    cache = DynamicCache(config=base.model.config)
    base.model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    shapes = set()
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        for each in (layer.keys, layer.values):
            assert each is not None
            shapes.add((each.shape[1], each.shape[3]))
    if len(shapes) > 1:
        raise ModelError(
            "this model's layers cache keys and values of different shapes "
            f"({', '.join(f'{heads} x {width}' for heads, width in sorted(shapes))}), which the "
            "export does not support."
        )
    return shapes.pop()


def export_onnx(
    base: BaseModel,
    routers: Routers,
    contract: Contract,
    folder: Path,
    static_removed: list[int],
    progress: Progress = silent,
) -> None:
    """Write the conditional graph and its peers.

    Args:
        base: the base model, float32.
        routers: its routers.
        contract: of the routed graph.
        folder: receives model.onnx with its data, dense.onnx, static.onnx (``static_removed``
            gone), ceiling.onnx (every routed sublayer gone), contract.json and the tokenizer.
        static_removed: decoder layers whose sublayer the static peer lacks.
        progress: one unit a part.

    Raises:
        ModelError: no layer has a cache for every sequence, an architecture that cannot be
            exported yet, or routers that decide once a token.
    """
    require_unit(routers.sublayers.unit, "sequence", "the exported graph")
    if len(contract.compact_layers) == contract.layers:
        raise ModelError(
            "every layer is routed; the export needs one layer that always executes.",
            "Set routing.exclude_last to 1 or more.",
        )

    def weights(layer: int) -> dict[str, Tensor]:
        return body_weights(base.model, routers.sublayers, layer)

    progress("export", 0, 6, "tracing")
    traced = trace(base.model, routers, contract)
    progress("export", 1, 6, "writing weights")
    model = routed_graph(traced, weights, contract)
    if not has_tables(model.graph):
        contract = replace(contract, positions=0)
    ir.save(
        model,
        folder / MODEL,
        external_data=DATA,
        max_workers=1,
        max_in_flight_bytes=1 << 24,
    )
    stored = ir.load(folder / MODEL).graph.initializers
    if contract.target == "ort":
        own_weights(folder / MODEL)
    peers = {DENSE: [], STATIC: static_removed, CEILING: routers.layers}
    for done, (name, removed) in enumerate(peers.items(), 2):
        progress("export", done, 6, name)
        peer = replace(
            contract,
            routed_layers=[],
            tau=[],
            removed_layers=list(removed),
            compensation_rank=0,
        )
        model = static_graph(traced, weights, peer)
        for value in model.graph.initializers.values():
            if value.name is not None and value.name in stored:
                value.const_value = stored[value.name].const_value
        ir.save(model, folder / name)
        peer.write(folder / name.replace(".onnx", ".contract.json"))
    progress("export", 5, 6, "checking")
    for name in (MODEL, *peers):
        onnx.checker.check_model(folder / name, full_check=True)
    contract.write(folder / CONTRACT)
    base.tokenizer.save_pretrained(folder)
    progress("export", 6, 6)


def export_run(
    run: Run,
    base: BaseModel,
    progress: Progress = silent,
    form: Form = PORTABLE,
    context: int = CONTEXT,
) -> dict[str, Any]:
    """Export a calibrated run to ``onnx/``, or in another form to the folder of its name.

    Args:
        run: its folder.
        base: its model, in the type that the graph is to have.
        progress: one unit a part.
        form: of the graph.
        context: positions of a sequence, see `contract_of`.

    Returns:
        The report, as saved in ``reports/export.json`` (``export-<form>.json``).

    Raises:
        ArtifactError: the run is not tuned or calibrated, or cannot be written.
        ModelError: see `export_onnx`.
    """
    started = time.monotonic()
    reset_peak()
    before = peak_rss()
    recipe = run.recipe()
    routers = load_routers(run, base)
    calibration = run.calibration()
    contract = contract_of(base, routers, calibration["tau"], recipe.export.opset, form, context)
    place = form.folder(run)
    removed = static_peer_layers(run, routers.layers, calibration["target"])
    with whole_folder(place) as folder:
        export_onnx(base, routers, contract, folder, removed, progress)
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    peak = peak_rss()
    report = {
        "file": f"{place.name}/{MODEL}",
        "target": form.target,
        "weights": form.weights,
        "opset": contract.opset,
        "ir_version": onnx.load(place / MODEL, load_external_data=False).ir_version,
        "bytes": sum(path.stat().st_size for path in place.iterdir()),
        "sha256": sha256(place / MODEL),
        "router_sha256": routers_hash(run),
        "seconds": round(time.monotonic() - started, 1),
        "weights_bytes": weights,
        "peak_rss_bytes": peak,
        "libraries_rss_bytes": LIBRARIES_RSS,
        "peak_memory_over_weights": round(_export_memory(before, peak, weights) / weights, 2),
        "if_nodes": sum(
            node.op_type == "If" and node.name.endswith(f".{contract.granularity}")
            for node in onnx.load(place / MODEL, load_external_data=False).graph.node
        ),
        "granularity": contract.granularity,
        "compensation_rank": contract.compensation_rank,
        "checker": "passed",
        "static_removed": removed,
    }
    run.write_report(form.report("export"), report)
    entry = {"sha256": report["sha256"], "opset": contract.opset}
    run.write_manifest(**{place.name: entry})
    return report


def static_peer_layers(run: Run, layers: list[int], capacity: float) -> list[int]:
    """Layers that the static peer lacks: as many as routing skips, by the recipe's rule."""
    order = saved_orders(run, layers)[run.recipe().static.rule]
    count = len(layers) - kept_count(capacity, len(layers))
    return sorted(layers[index] for index in order[:count])


def peak_rss() -> int:
    """Largest resident memory of this process, bytes; on Linux since `reset_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Forget the peak of earlier steps in this process, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _export_memory(before: int, peak: int, weights: int) -> int:
    """Upper bound of the export's own memory, bytes: the weights and what it adds to them.

    Without the libraries, which cost the same for any model, and without what earlier steps
    in the same process have left behind, where that is more.
    """
    return min(peak - LIBRARIES_RSS, peak - before + weights)


# What torch, transformers and onnx take before any weight is read.
LIBRARIES_RSS = peak_rss()
