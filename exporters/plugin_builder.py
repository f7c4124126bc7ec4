"""The graph whose routed work a plugin does: no conditionals, decisions as tensors.

Every product with a weight of a routed sublayer, and every attention, is an operator of mskip's own
(`mskip.exporters.routed_ops`) that is handed the decisions and does nothing for a sequence that
skips. What is left of a sublayer (norms, rotary embedding, sums) is small and runs for all. So a
batch whose sequences decide differently pays for those that execute, and nothing waits for the
host.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mskip.exporters.buffer_builder import OPSET, BufferBuilder
from mskip.exporters.builder import branch_prefix, inputs_of, layer_of
from mskip.exporters.contract import Contract
from mskip.exporters.layers import DOMAIN
from mskip.exporters.routed_ops import ATTENTION, LINEAR, reference_functions
from mskip.exporters.splicing import bound, constant, moved, substitute

_INT = {"to": ir.DataType.INT32}


class PluginBuilder(BufferBuilder):
    """See the module."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.products: list[tuple[ir.Node, ir.Value]] = []
        """Products of routed sublayers, and who executes them."""

    def conditional_sublayer(self, node: ir.Node) -> None:
        """The sublayer and what stands for it, each for its own sequences."""
        layer = layer_of(node)
        gate, _, _, hidden, *place = inputs_of(node)
        weights = self.weights_of(layer)
        prefix = branch_prefix(layer, self.granularity)
        whole = bound(self.traced.bodies[layer].execute, [hidden, *place, *weights], prefix)
        output, *present = whole.outputs
        instead = self._instead(layer, hidden, weights, f"layers.{layer}.skip/")
        (skipped,) = instead.outputs

        decided = tape.Tape()
        execute = decided.op("Cast", [gate], attributes=_INT)
        skip = decided.op("Cast", [decided.op("Not", [gate])], attributes=_INT)
        chosen = tape.Tape()
        axes = constant(chosen, np.array([1, 2], dtype=np.int64))
        rows = chosen.op("Unsqueeze", [gate, axes])
        result = chosen.op("Where", [rows, output, skipped])
        for number, made in enumerate([*decided.nodes, *chosen.nodes]):
            made.name = f"layers.{layer}.decided/{number}"
        inside, outside = moved(whole, self.graph), moved(instead, self.graph)
        self._hand(inside, execute, weights)
        self._hand(outside, skip, weights)
        nodes = [*decided.nodes, *inside, *outside, *chosen.nodes]
        self.graph.insert_before(node, nodes)
        substitute(self.graph, node, [result, *present])

    def _hand(self, nodes: list[ir.Node], execute: ir.Value, weights: list[ir.Value]) -> None:
        """Decisions to the attention among ``nodes``, and later to the products with a weight."""
        for node in nodes:
            if node.op_type == ATTENTION:
                node.resize_inputs(5)
                node.replace_input_with(4, execute)
            elif node.op_type == "MatMul":
                right = node.inputs[1]
                maker = None if right is None else right.producer()
                if maker is not None and maker.op_type == "Transpose":
                    right = maker.inputs[0]
                if right in weights:
                    self.products.append((node, execute))

    def last_forms(self) -> None:
        """Our operators, whole; see `BufferBuilder.last_forms` for the writes."""
        super().last_forms()
        for node, execute in self.products:
            x, weight = inputs_of(node)
            routed = ir.node(LINEAR, [x, weight, execute], domain=DOMAIN, name=node.name)
            (output,) = node.outputs
            routed.outputs[0].type, routed.outputs[0].name = output.type, output.name
            self.graph.insert_before(node, routed)
            ir.convenience.replace_all_uses_with(output, routed.outputs[0])
            self.graph.remove(node, safe=True)
        positions = next(value for value in self.graph.inputs if value.name == "position_ids")
        always = self._always(positions)
        for node in self.placeholders(ATTENTION):
            if len(node.inputs) == 4:  # of a layer that is not routed
                node.resize_inputs(5)
                node.replace_input_with(4, always)
            node.resize_inputs(6)
            node.replace_input_with(5, positions)
            node.version = None

    def _always(self, positions: ir.Value) -> ir.Value:
        """The decision to execute, for every sequence."""
        top = tape.Tape()
        batch = top.op("Shape", [positions], attributes={"start": 0, "end": 1})
        one = ir.tensor(np.ones(1, dtype=np.int32))
        value = top.op("ConstantOfShape", [batch], attributes={"value": one})
        for number, made in enumerate(top.nodes):
            made.name = f"always/{number}"
        self.graph.insert_before(self.graph[0], list(top.nodes))
        return value

    def finish(self, contract: Contract) -> ir.Model:
        """See `Builder.finish`; what the operators compute is put into the file."""
        model = super().finish(contract)
        model.graph.opset_imports[DOMAIN] = model.opset_imports[DOMAIN] = 1
        for function in reference_functions(OPSET):
            model.functions[function.identifier()] = function
        return model
