"""Puts traced parts together: conditionals, sublayers in place or left out, weights, names.

A routed sublayer becomes ``If(all gates)``. Its then-branch is the body as it is; its else-branch
is ``If(any gate)``: the executing rows picked, the body run on them and the result scattered among
what a skip gives, or what a skip gives alone (zeros, of a block its input, or the compensation) and
an empty cache, touching neither the sublayer's weights nor its keys. Weights stay initializers of
the main graph, which every branch reads. Where no decision of a call is open, the gates are looked
up in what the input says of all layers, and no layer computes anything for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes import common
from onnx_ir.traversal import RecursiveGraphIterator
from torch import Tensor

import mskip
from mskip.compressor.sublayers import Granularity
from mskip.exporters.bodies import Body
from mskip.exporters.contract import UNSCORED, Contract
from mskip.exporters.fused import MICROSOFT
from mskip.exporters.layers import DECISION, DOMAIN
from mskip.exporters.quantised import quantise_products
from mskip.exporters.splicing import (
    DTYPES,
    bound,
    constant,
    initializer,
    moved,
    renamed,
    substitute,
)
from mskip.exporters.tidying import (
    before_branch,
    into_branch,
    unname_unwanted,
    unshadow,
)
from mskip.exporters.tracing import Traced
from mskip.exporters.weight_layout import fold_transposes, share_tied_head

_SMALL = 16
"""Elements of a constant that says what a node does, such as the bounds of a slice."""

Weights = Callable[[int], dict[str, Tensor]]
"""Decoder layer -> what its body reads, by name; see `body_weights`."""


def branch_prefix(layer: int, granularity: Granularity = "attention") -> str:
    """Prefix of every node name in the then-branch of a layer's sublayer."""
    return f"layers.{layer}.{granularity}/"


def layer_of(node: ir.Node) -> int:
    """The decoder layer of a placeholder."""
    return node.attributes["layer"].as_int()


class Known(NamedTuple):
    """What the graph's input says of decisions that were handed in.

    Attributes:
        undecided: whether any decision of the call is open, [] bool.
        every: whether every row executes, [routed] bool.
        some: whether any row does, [1] bool a routed layer.
    """

    undecided: ir.Value
    every: ir.Value
    some: list[ir.Value]


class Builder:
    """Puts a trace's parts together, in a copy of its trunk."""

    def __init__(self, traced: Traced, weights: Weights) -> None:
        self.traced = traced
        self.weights = weights
        self.granularity = traced.contract.granularity
        self._zero = ir.tensor(np.zeros(1, DTYPES[traced.contract.dtype].numpy()))
        self.model = traced.trunk.clone()
        self.graph = self.model.graph
        self.known: Known
        self.shape: ir.Value | None = None
        """Of the hidden states, once it is known."""

    @property
    def routing(self) -> ir.Value:
        """The decisions that are handed in, [batch, routed]."""
        return next(value for value in self.graph.inputs if value.name == "routing")

    def placeholders(self, kind: str) -> list[ir.Node]:
        return [n for n in self.graph if n.domain == DOMAIN and n.op_type == kind]

    # -- placeholders to nodes --

    def known_decisions(self) -> Known:
        """What is said of all layers at once, for calls without an open decision."""
        routing, top = self.routing, tape.Tape()
        rows, zero = (constant(top, np.array(n, dtype=np.int64)) for n in ([0], 0))
        least, most = (
            top.op(kind, [routing, rows], {"keepdims": 0}) for kind in ("ReduceMin", "ReduceMax")
        )
        least_of_all = top.op("ReduceMin", [least], {"keepdims": 0})
        undecided = top.op("Less", [least_of_all, zero])
        every, some = (top.op("Greater", [each, zero]) for each in (least, most))
        count = len(self.traced.contract.routed_layers)
        each = [some]
        if count > 1:
            each = list(
                top.op_multi_out("Split", [some], {"num_outputs": count}, num_outputs=count)
            )
        for number, made in enumerate(top.nodes):
            made.name = f"known/{number}"
        self.graph.insert_before(self.graph[0], list(top.nodes))
        return Known(undecided, every, each)

    def take_decisions(self) -> None:
        """Routers' decisions, or those that were handed in."""
        decisions = self.placeholders(DECISION)
        self.known = self.known_decisions()
        self.conditional_mask(decisions)
        for node in decisions:
            self.conditional_decision(node)
        self.conditional_report()

    def conditional_mask(self, decisions: list[ir.Node]) -> None:
        """``If(any decision of the call is open)``: which tokens are the prompt's, or nothing."""
        mask = decisions[0].inputs[2]
        assert mask is not None
        if any(use.node not in decisions for use in mask.uses()):
            return
        made = ir.Graph([], [], nodes=self._taken_out([mask]), name="prompt/")
        nothing = tape.Tape()
        zero = constant(nothing, np.zeros((1, 1), dtype=np.int64))
        otherwise = graph_of(nothing, [zero], "no_prompt/")
        branches = conditional(self.known.undecided, made, otherwise, "if.prompt")
        self.graph.insert_before(self.graph[0], branches)
        for each in decisions:
            each.replace_input_with(2, branches.outputs[0])
        made.outputs.append(mask)

    def conditional_decision(self, node: ir.Node) -> None:
        """``If(any decision of the call is open)``: take the layer's, or look it up.

        Every node shows in a step of decoding. So where all is known, nothing is computed here but
        what decides whether all rows execute; what the others need, their branch looks up.
        """
        _, *given = inputs_of(node)
        then = bound(self.traced.decision, given, f"{node.name}/")
        otherwise = tape.Tape()
        at = constant(otherwise, np.array(self._index(layer_of(node)), dtype=np.int64))
        looked_up = [
            constant(otherwise, np.array([False])),
            constant(otherwise, np.array([UNSCORED], dtype=np.float32)),
            constant(otherwise, np.array(False)),
            otherwise.op("Gather", [self.known.every, at]),
        ]
        decided = graph_of(otherwise, looked_up, f"{node.name}/known/")
        branches = conditional(self.known.undecided, then, decided, f"if.{node.name}")
        self.graph.insert_before(node, branches)
        substitute(self.graph, node, list(branches.outputs))
        into_branch(then, given[1:])

    def _index(self, layer: int) -> int:
        return self.traced.contract.routed_layers.index(layer)

    def _gate(self, into: tape.Tape, layer: int, taken: ir.Value) -> ir.Value:
        """The rows that execute, [batch] bool: by a decision that was taken, or handed in."""
        at, zero = (constant(into, np.array(n, dtype=np.int64)) for n in (self._index(layer), 0))
        given = into.op("Gather", [self.routing, at], {"axis": 1})
        return into.op("Or", [taken, into.op("Greater", [given, zero])])

    def conditional_report(self) -> None:
        """``If(any decision of the call is open)``: put the layers' side by side, or repeat what
        was handed in."""
        reported = [v for v in self.graph.outputs if v.name in ("routing_out", "routing_scores")]
        decided = ir.Graph([], [], nodes=self._taken_out(reported), name="reported/")
        otherwise = tape.Tape()
        unscored = ir.tensor(np.array([UNSCORED], dtype=np.float32))
        shape = otherwise.op("Shape", [self.routing])
        repeated = {
            "routing_out": otherwise.op("Identity", [self.routing]),
            "routing_scores": otherwise.op("ConstantOfShape", [shape], {"value": unscored}),
        }
        given = graph_of(otherwise, [repeated[value.name or ""] for value in reported], "given/")
        made = conditional(self.known.undecided, decided, given, "if.reported")
        self.graph.append(made)
        for number, (old, new) in enumerate(zip(reported, made.outputs, strict=True)):
            new.type, new.shape, new.name = old.type, old.shape, old.name
            old.name = f"reported/{number}"
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
        decided.outputs.extend(reported)

    def _taken_out(self, results: list[ir.Value]) -> list[ir.Node]:
        """Take the nodes out of the graph that make these values and nothing else, in order.

        What conditionals give stays where it is.
        """
        wanted: set[ir.Node] = set()
        for node in reversed(list(self.graph)):
            needed = [
                value in results or (value.uses() and all(u.node in wanted for u in value.uses()))
                for value in node.outputs
            ]
            if all(needed) and node.op_type != "If":
                wanted.add(node)
        nodes = [node for node in self.graph if node in wanted]
        self.graph.remove(nodes)
        return nodes

    def conditional_sublayer(self, node: ir.Node) -> None:
        layer = layer_of(node)
        body = self.traced.bodies[layer]
        gate, anyone, everyone, hidden, *place = inputs_of(node)
        if self.granularity == "mlp":
            place, past = [], []
        else:
            place, past = place[:-2], place[-2:]
        weights = self.weights_of(layer)
        prefix = branch_prefix(layer, self.granularity)
        if self.shape is None:
            top = tape.Tape()
            self.shape = top.op("Shape", [hidden], name="shape")
            self.graph.insert_before(node, list(top.nodes))
        before = tape.Tape()
        gate = self._gate(before, layer, gate)
        some = self._picked(f"{prefix}some/", body, before, gate, hidden, place, past, weights)
        none = self._skip(layer, body, hidden, place, past, weights)
        # Neither `If` is named like the branches' nodes: they run whatever is skipped.
        name = f"if.{prefix.rstrip('/')}"
        either = tape.Tape()
        handed = self.known.some[self._index(layer)]
        anyone = either.op("Or", [anyone, handed], name=f"{name}.some")
        branches = conditional(anyone, some, none, f"{name}.any")
        nodes = [*either.nodes, branches]
        if self.traced.contract.weights == "float":
            every = bound(body.execute, [hidden, *place, *past, *weights], f"{prefix}all/")
            self.graph.insert_before(node, before_branch(every, place, self.graph))
            around = ir.Graph([], list(branches.outputs), nodes=nodes, name=f"{prefix}not_all")
            branches = conditional(everyone, every, around, name)
            nodes = [branches]
        # Else the rows are always picked: ONNX Runtime packs weights for the branches of the main
        # graph, not for theirs, and its products of rounded weights are slower without, and round
        # otherwise, so that a row would depend on the others in its batch. (Weights that are not
        # rounded are packed in both, see `own_weights`.)
        self.graph.insert_before(node, nodes)
        substitute(self.graph, node, list(branches.outputs))

    def _picked(
        self,
        prefix: str,
        body: Body,
        before: tape.Tape,
        gate: ir.Value,
        hidden: ir.Value,
        place: list[ir.Value],
        past: list[ir.Value],
        weights: list[ir.Value],
    ) -> ir.Graph:
        """The body on the executing rows, put among what a skip gives; ``before`` comes first."""
        rows = _numbers(before, gate)

        def taken(value: ir.Value) -> ir.Value:
            return before.op("Gather", [value, rows], attributes={"axis": 0})

        some = [
            each if shared else taken(each)
            for each, shared in zip([hidden, *place], [False, *body.shared], strict=True)
        ]
        count = before.op("Shape", [rows])
        for each in past:
            # At prefill the past is empty and has any number of rows; while decoding
            # it has one row for each executing sequence and this changes nothing.
            tail = before.op("Shape", [each], attributes={"start": 1})
            shape = before.op("Concat", [count, tail], attributes={"axis": 0})
            some.append(before.op("Reshape", [each, shape]))
        graph = bound(body.execute, [*some, *weights], prefix, list(before.nodes))
        output, *present = graph.outputs

        after = tape.Tape()
        base = hidden
        if self.granularity != "block":
            base = after.op("ConstantOfShape", [self.shape], {"value": self._zero})
        if body.skip is not None:
            others = _numbers(after, after.op("Not", [gate]))
            left = after.op("Gather", [hidden, others], attributes={"axis": 0})
            skipped = bound(body.skip, [left, *weights], f"{prefix}others/")
            (instead,) = skipped.outputs
            # The nodes so far, then the skip's own, then what reads them.
            graph.extend([*after.nodes, *moved(skipped, graph)])
            after = tape.Tape()
            base = _scattered(after, base, others, instead)
        placed = _scattered(after, base, rows, output)
        graph.extend(after.nodes)
        graph.outputs.clear()
        graph.outputs.extend([placed, *present])
        renamed(graph, prefix)
        return graph

    def _skip(
        self,
        layer: int,
        body: Body,
        hidden: ir.Value,
        place: list[ir.Value],
        past: list[ir.Value],
        weights: list[ir.Value],
    ) -> ir.Graph:
        """The else-branch: what a skip gives, and a cache without rows, or as it was."""
        name = f"layers.{layer}.skip/"
        skip = tape.Tape()
        empty = []
        if body.mask is not None:
            contract = self.traced.contract
            parts = [
                constant(skip, np.array([0, contract.kv_heads], dtype=np.int64)),
                # Past and new positions; the past itself is not looked at.
                skip.op("Shape", [place[body.mask]], attributes={"start": -1}),
                constant(skip, np.array([contract.head_dim], dtype=np.int64)),
            ]
            shape = skip.op("Concat", parts, attributes={"axis": 0})
            empty = [skip.op("ConstantOfShape", [shape], attributes={"value": self._zero})]
            empty.append(skip.op("Identity", empty))
        elif past:
            # A buffer that is bound as past and as present: nothing is copied.
            empty = [skip.op("Identity", [each]) for each in past]
        if body.skip is not None:
            graph = bound(body.skip, [hidden, *weights], name, list(skip.nodes))
            graph.outputs.extend(empty)
            return graph
        if self.granularity == "block":
            output = skip.op("Identity", [hidden])
        else:
            output = skip.op("ConstantOfShape", [self.shape], attributes={"value": self._zero})
        return graph_of(skip, [output, *empty], name)

    def inline_sublayer(self, node: ir.Node) -> None:
        layer = layer_of(node)
        _, _, _, *arguments = inputs_of(node)
        body = bound(
            self.traced.bodies[layer].execute,
            [*arguments, *self.weights_of(layer)],
            branch_prefix(layer, self.granularity),
        )
        outputs = list(body.outputs)
        self.graph.insert_before(node, moved(body, self.graph))
        substitute(self.graph, node, outputs)

    def remove_sublayer(self, node: ir.Node) -> None:
        (output, *_) = node.outputs
        if self.granularity == "block":
            passed = node.inputs[3]
            assert passed is not None
            ir.convenience.replace_all_uses_with(output, passed)
        self._drop_addend(output)
        dropped = set(node.outputs[1:])
        kept = [value for value in self.graph.outputs if value not in dropped]
        self.graph.outputs.clear()
        self.graph.outputs.extend(kept)
        self.graph.remove(node, safe=True)

    def _drop_addend(self, nothing: ir.Value) -> None:
        """The residual stream passes by: the sum with nothing is the other operand."""
        for use in list(nothing.uses()):
            reader = use.node
            if reader.op_type in ("Mul", "Cast", "Identity"):  # a multiple of nothing
                self._drop_addend(reader.outputs[0])
            else:
                assert reader.op_type == "Add"
                (passed,) = [value for value in reader.inputs if value is not nothing]
                assert passed is not None
                ir.convenience.replace_all_uses_with(
                    reader.outputs[0], passed, replace_graph_outputs=True
                )
            self.graph.remove(reader, safe=True)

    # -- helpers --

    def weights_of(self, layer: int) -> list[ir.Value]:
        values = []
        for name, parameter in self.weights(layer).items():
            full = f"layers.{layer}.{self.granularity}.{name}"
            if full not in self.graph.initializers:
                self.graph.register_initializer(initializer(full, parameter))
            values.append(self.graph.initializers[full])
        return values

    def keep_interface(self, contract: Contract) -> None:
        """Drop inputs and outputs that the contract does not have, and what only they needed."""
        wanted = {spec.name for spec in contract.outputs()}
        kept = [value for value in self.graph.outputs if value.name in wanted]
        self.graph.outputs.clear()
        self.graph.outputs.extend(kept)
        common.RemoveUnusedNodesPass()(self.model)
        inputs = {spec.name for spec in contract.inputs()}
        for value in [value for value in self.graph.inputs if value.name not in inputs]:
            self._measure_elsewhere(value, contract)
            self.graph.inputs.remove(value)

    def _measure_elsewhere(self, dropped: ir.Value, contract: Contract) -> None:
        """Read the sizes that the trace took from an input that goes from one that stays."""
        symbols = {spec.name: spec.axes for spec in self.traced.contract.inputs()}
        sources = {value.name: value for value in self.graph.inputs}
        for use in list(dropped.uses()):
            node = use.node
            assert node.op_type == "Shape"
            symbol = symbols[dropped.name or ""][node.attributes["start"].as_int()]
            name, axis = next(
                (spec.name, spec.axes.index(symbol))
                for spec in contract.inputs()
                if symbol in spec.axes
            )
            node.replace_input_with(0, sources[name])
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)

    def first_forms(self, contract: Contract) -> None:
        """What a target has nodes of its own for, while weights lie as the model has them."""

    def last_forms(self) -> None:
        """What a target has nodes of its own for, once the graph is whole."""

    def finish(self, contract: Contract) -> ir.Model:
        """Round or transpose weights, drop what is unused, name the axes."""
        self.first_forms(contract)
        if contract.weights != "float":
            quantise_products(self.graph, contract.weights)
        share_tied_head(self.graph)
        fold_transposes(self.graph)
        self.last_forms()
        # What every layer computes from the same tables, once; their constants have to be one.
        common.DeduplicateInitializersPass(size_limit=_SMALL)(self.model)
        common.CommonSubexpressionEliminationPass()(self.model)
        common.RemoveUnusedNodesPass()(self.model)
        for name in [n for n, v in self.graph.initializers.items() if not v.uses()]:
            self.graph.initializers.pop(name)
        _strip_shapes(self.graph)
        axes = {spec.name: spec.axes for spec in (*contract.inputs(), *contract.outputs())}
        for value in (*self.graph.inputs, *self.graph.outputs):
            assert value.name is not None
            value.shape = ir.Shape(axes[value.name])
        if any(node.domain == MICROSOFT for node in RecursiveGraphIterator(self.graph)):
            self.graph.opset_imports[MICROSOFT] = self.model.opset_imports[MICROSOFT] = 1
        self.graph.opset_imports.pop(DOMAIN, None)
        self.model.opset_imports.pop(DOMAIN, None)
        common.TopologicalSortPass()(self.model)
        common.NameFixPass()(self.model)
        unshadow(self.graph)
        unname_unwanted(self.graph)
        # The trace's notes are larger than the graph, and hold paths of this machine.
        common.ClearMetadataAndDocStringPass()(self.model)
        self.model.producer_name, self.model.producer_version = "mskip", mskip.__version__
        return self.model


def inputs_of(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _scattered(into: tape.Tape, base: ir.Value, rows: ir.Value, some: ir.Value) -> ir.Value:
    """``base`` with the rows numbered by ``rows`` [n] replaced by those of ``some``."""
    one = constant(into, np.array([1], dtype=np.int64))
    return into.op("ScatterND", [base, into.op("Unsqueeze", [rows, one]), some])


def _numbers(into: tape.Tape, gate: ir.Value) -> ir.Value:
    """The rows where ``gate`` [batch] is open, [n] int64."""
    zero = constant(into, np.array([0], dtype=np.int64))
    return into.op("Squeeze", [into.op("NonZero", [gate]), zero])


def conditional(condition: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str) -> ir.Node:
    branches = {"then_branch": then, "else_branch": otherwise}
    made = [ir.Value(name=f"{name}.{number}") for number in range(len(otherwise.outputs))]
    return ir.node("If", [condition], branches, outputs=made, name=name)


def graph_of(from_: tape.Tape, outputs: list[ir.Value], name: str) -> ir.Graph:
    graph = ir.Graph([], outputs, nodes=list(from_.nodes), name=name)
    renamed(graph, name)
    return graph


def _strip_shapes(graph: ir.Graph) -> None:
    # The trace's symbols mean nothing to a reader, and a branch's shapes hold only
    # for its own side; runtimes infer what they need.
    for node in RecursiveGraphIterator(graph):
        for value in node.outputs:
            value.shape = None
