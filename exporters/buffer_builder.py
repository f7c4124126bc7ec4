"""The conditional graph that TensorRT can build: caches at the top level, no nesting, equal ranks.

TensorRT wants keys and values as inputs of the network that are written at its top level, and no
conditional in another (docs/tensorrt.md). So a routed attention becomes two conditionals on one
condition, with the write between them: the new keys and values, and all that reads the cache. In a
batch both run where any sequence executes, and the rows that skip are put right by a selection.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.traversal import RecursiveGraphIterator

from mskip.exporters.builder import (
    Builder,
    branch_prefix,
    conditional,
    graph_of,
    inputs_of,
    layer_of,
)
from mskip.exporters.graph_cache import WRITE
from mskip.exporters.layers import DECISION
from mskip.exporters.splicing import bound, constant, moved, substitute
from mskip.exporters.tidying import before_branch

OPSET = 24
"""The first that has TensorScatter."""
_WRITE = WRITE.partition("::")[2]


class BufferBuilder(Builder):
    """See the module."""

    def take_decisions(self) -> None:
        """In every call: what a step computes for nothing is less than a conditional."""
        for node in self.placeholders(DECISION):
            _, *given = inputs_of(node)
            body = bound(self.traced.decision, given, f"{node.name}/")
            outputs = list(body.outputs)
            self.graph.insert_before(node, moved(body, self.graph))
            substitute(self.graph, node, outputs)

    def conditional_sublayer(self, node: ir.Node) -> None:
        """One conditional, or two with the write of keys and values between them."""
        layer = layer_of(node)
        body = self.traced.bodies[layer]
        gate, anyone, _, hidden, *place = inputs_of(node)
        weights = self.weights_of(layer)
        prefix = branch_prefix(layer, self.granularity)
        name = f"if.{prefix.rstrip('/')}"
        whole = bound(body.execute, [hidden, *place, *weights], prefix)
        self.graph.insert_before(node, before_branch(whole, place, self.graph))
        output, *present = whole.outputs
        nodes = moved(whole, self.graph)
        writes = [each for each in nodes if each.op_type == _WRITE]
        if writes:
            nodes = self._keys_first(node, nodes, writes, anyone, hidden, name)
        instead = self._instead(layer, hidden, weights, f"{prefix}row/")
        chosen = tape.Tape()
        axes = constant(chosen, np.array([1, 2], dtype=np.int64))
        rows = chosen.op("Unsqueeze", [gate, axes])
        (skipped,) = instead.outputs
        result = chosen.op("Where", [rows, output, skipped])
        inside = [*nodes, *moved(instead, self.graph), *chosen.nodes]
        then = ir.Graph([], [result], nodes=inside, name=prefix)
        none = self._instead(layer, hidden, weights, f"layers.{layer}.skip/")
        branches = conditional(anyone, then, none, name)
        self.graph.insert_before(node, branches)
        substitute(self.graph, node, [*branches.outputs, *present])

    def _keys_first(
        self,
        node: ir.Node,
        nodes: list[ir.Node],
        writes: list[ir.Node],
        anyone: ir.Value,
        hidden: ir.Value,
        name: str,
    ) -> list[ir.Node]:
        """Put the first conditional and the writes before ``node``; gives what is left."""
        handed = [inputs_of(write)[1] for write in writes]
        first = _makers(handed, set(nodes))
        rest = [each for each in nodes if each not in first and each not in writes]
        handed += [
            value
            for each in nodes
            if each in first
            for value in each.outputs
            if value not in handed and any(use.node not in first for use in value.uses())
        ]
        then = ir.Graph([], handed, nodes=[each for each in nodes if each in first], name=name)
        otherwise = tape.Tape()
        nothing = [self._zeros(otherwise, value, hidden) for value in handed]
        none = graph_of(otherwise, nothing, f"{name}.none/")
        branches = conditional(anyone, then, none, f"{name}.keys")
        for inner, outer in zip(handed, branches.outputs, strict=True):
            outer.type, outer.shape = inner.type, inner.shape
            for use in list(inner.uses()):
                if use.node not in first:
                    use.node.replace_input_with(use.idx, outer)
        self.graph.insert_before(node, [branches, *writes])
        for number, write in enumerate(writes):
            write.name = f"{name}.write.{number}"
        return rest

    def _zeros(self, into: tape.Tape, like: ir.Value, hidden: ir.Value) -> ir.Value:
        """As many dimensions and, of new keys and values, the same sizes: they are written."""
        assert like.shape is not None
        sizes = [each if isinstance(each, int) else None for each in like.shape]
        lead = [
            into.op("Shape", [hidden], attributes={"start": axis, "end": axis + 1})
            for axis in (0, 1)
        ]
        varying = iter(lead)  # batch, then sequence, in this order in all that is handed on
        parts = [
            next(varying) if size is None else constant(into, np.array([size], dtype=np.int64))
            for size in sizes
        ]
        shape = into.op("Concat", parts, attributes={"axis": 0})
        return into.op("ConstantOfShape", [shape], attributes={"value": self._zero})

    def _instead(
        self, layer: int, hidden: ir.Value, weights: list[ir.Value], name: str
    ) -> ir.Graph:
        """What a skip gives for all rows."""
        body = self.traced.bodies[layer]
        if body.skip is not None:
            return bound(body.skip, [hidden, *weights], name)
        skip = tape.Tape()
        if self.granularity == "block":
            return graph_of(skip, [skip.op("Identity", [hidden])], name)
        shape = skip.op("Shape", [hidden])
        zeros = skip.op("ConstantOfShape", [shape], attributes={"value": self._zero})
        return graph_of(skip, [zeros], name)

    def last_forms(self) -> None:
        """Writes of keys and values, each row at the position of its first new token."""
        positions = next(value for value in self.graph.inputs if value.name == "position_ids")
        top = tape.Tape()
        first = top.op("Gather", [positions, constant(top, np.int64(0))], attributes={"axis": 1})
        for number, made in enumerate(top.nodes):
            made.name = f"places/{number}"
        self.graph.insert_before(self.graph[0], list(top.nodes))
        for node in self.placeholders(_WRITE):
            write = ir.node(
                "TensorScatter", [*node.inputs, first], {"axis": 2}, num_outputs=1, name=node.name
            )
            self.graph.insert_before(node, write)
            substitute(self.graph, node, list(write.outputs))
        self._known_sizes(positions)
        self.graph.opset_imports[""] = self.model.opset_imports[""] = OPSET

    def _known_sizes(self, positions: ir.Value) -> None:
        """Sizes that the trace took from keys and values: of the batch, or fixed."""
        capacity = self.traced.contract.capacity
        for node in list(RecursiveGraphIterator(self.graph)):
            source = node.inputs[0] if node.op_type == "Shape" else None
            if source is None or not (source.name or "").startswith("past_key_values."):
                continue
            if node.attributes["start"].as_int() == 0:
                node.replace_input_with(0, positions)
                continue
            fixed = tape.Tape()
            size = constant(fixed, np.array([capacity], dtype=np.int64))
            owner = node.graph
            assert owner is not None
            owner.insert_before(node, list(fixed.nodes))
            ir.convenience.replace_all_uses_with(node.outputs[0], size)
            owner.remove(node, safe=True)


def _makers(values: list[ir.Value], among: set[ir.Node]) -> set[ir.Node]:
    """The nodes that values come from."""
    found: set[ir.Node] = set()
    open_ = list(values)
    while open_:
        maker = open_.pop().producer()
        if maker is not None and maker in among and maker not in found:
            found.add(maker)
            open_ += inputs_of(maker)
    return found
