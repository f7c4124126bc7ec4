"""From traced parts to a graph: routed with conditionals, dense, or static."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mskip.exporters.buffer_builder import BufferBuilder
from mskip.exporters.builder import Builder, Weights, layer_of
from mskip.exporters.contract import Contract, Target
from mskip.exporters.fused_builder import FusedBuilder
from mskip.exporters.layers import SUBLAYER
from mskip.exporters.plugin_builder import PluginBuilder
from mskip.exporters.tracing import Traced


def routed_graph(traced: Traced, weights: Weights, contract: Contract) -> ir.Model:
    """The conditional graph."""
    builder = _builder(traced, weights)
    builder.take_decisions()
    for node in builder.placeholders(SUBLAYER):
        builder.conditional_sublayer(node)
    model = builder.finish(contract)
    tau = next(value for value in model.graph.inputs if value.name == "tau")
    tau.const_value = ir.tensor(np.array(contract.tau, dtype=np.float32), name="tau")
    model.graph.initializers["tau"] = tau
    return model


def static_graph(traced: Traced, weights: Weights, contract: Contract) -> ir.Model:
    """A graph without routing: sublayers of ``contract.removed_layers`` are gone, the rest dense.

    With nothing removed this is the dense model, lowered by the same exporter.
    """
    builder = _builder(traced, weights)
    for node in builder.placeholders(SUBLAYER):
        if layer_of(node) in contract.removed_layers:
            builder.remove_sublayer(node)
        else:
            builder.inline_sublayer(node)
    builder.keep_interface(contract)
    return builder.finish(contract)


def _builder(traced: Traced, weights: Weights) -> Builder:
    return _BUILDERS.get(traced.contract.target, Builder)(traced, weights)


_BUILDERS: dict[Target, type[Builder]] = {
    "ort": FusedBuilder,
    "trt": BufferBuilder,
    "trt-plugin": PluginBuilder,
}
