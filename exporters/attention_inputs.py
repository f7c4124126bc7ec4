"""What ONNX Runtime's fused attention takes in: unturned heads, and one product for three.

`GroupQueryAttention` turns queries and keys itself, given tables of cosines and sines by position,
and takes queries, keys and values side by side, as one product gives them. Both say the same in
fewer nodes, and a step of decoding is short enough for nodes to be seen in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.traversal import RecursiveGraphIterator

from mskip.exporters.splicing import lazy, stored

Array = npt.NDArray[Any]

_COSINES, _SINES = 7, 8
"""Numbers of the kernel's inputs."""
_MULTIPLE = 16
"""The kernel turns heads whose width is a multiple of it."""
_TABLE = "rotary."
_FED = "position_ids", "input_ids", "attention_mask"


def rotate_inside(graph: ir.Graph, positions: int) -> None:
    """Let attentions turn their queries and keys, where that depends on the position alone.

    The kernel counts positions from the first token in its buffer, as the contract of buffers has
    it, and no longer looks at those that are handed in.

    Args:
        graph: the main graph; its branches are looked at, too.
        positions: that the tables have.
    """
    tables = _Tables(graph, positions)
    for node in _attentions(graph):
        turned = [None if value is None else value.producer() for value in node.inputs[:2]]
        queries, keys = turned
        if queries is None or keys is None:
            continue
        if any(each.op_type != "RotaryEmbedding" for each in (queries, keys)):
            continue
        pairs = [tables.of(each) for each in (queries, keys)]
        if pairs[0] is None or pairs[0] != pairs[1]:
            continue
        node.resize_inputs(max(len(node.inputs), _SINES + 1))
        for number, value in zip((_COSINES, _SINES), pairs[0], strict=True):
            node.replace_input_with(number, value)
        for number, each in enumerate((queries, keys)):
            node.replace_input_with(number, each.inputs[0])
            _remove_unread(each)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def has_tables(graph: ir.Graph) -> bool:
    """Whether any attention turns its queries and keys by tables."""
    return any(name.startswith(_TABLE) for name in graph.initializers)


def join_projections(graph: ir.Graph) -> None:
    """Make queries, keys and values with one product, where they are products of the same states.

    Args:
        graph: the main graph, which has the weights; its branches are looked at, too. Weights
            lie as the model has them, [outputs, inputs], and are read through a `Transpose`.
    """
    for node in list(_attentions(graph)):
        parts = [_projection(value, graph) for value in node.inputs[:3]]
        found = [part for part in parts if part is not None]
        if len(found) < 3 or any(part.states is not found[0].states for part in found):
            continue
        biases = [part.bias for part in found if part.bias is not None]
        if len(biases) not in (0, 3):
            continue
        owner, first = node.graph, found[0].last
        assert owner is not None
        weight = _joined(graph, [part.weight for part in found])
        name = first.name or ""
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}.turned")
        product = ir.node("MatMul", [found[0].states, turned.outputs[0]], name=f"{name}.joined")
        made = [turned, product]
        if biases:
            bias = _joined(graph, biases)
            made.append(ir.node("Add", [product.outputs[0], bias], name=f"{name}.biased"))
        for each in made:
            each.outputs[0].name = f"{each.name}.output"
            each.outputs[0].type = first.outputs[0].type
        owner.insert_before(node, made)
        node.replace_input_with(0, made[-1].outputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        for part in found:
            _remove_unread(part.last)


def _attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    return (n for n in RecursiveGraphIterator(graph) if n.op_type == "GroupQueryAttention")


def _remove_unread(node: ir.Node) -> None:
    """Remove a node that nobody reads, and those that only it has read."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    makers = [value.producer() for value in node.inputs if value is not None]
    assert node.graph is not None
    owner = node.graph
    owner.remove(node, safe=True)
    for maker in dict.fromkeys(makers):
        if maker is not None and maker.graph is owner:
            _remove_unread(maker)


# -- tables -----------------------------------------------------------------------------------


class _Tables:
    """Cosines and sines by position, as initializers of the main graph.

    Args:
        graph: the main graph.
        positions: rows of a table.
    """

    def __init__(self, graph: ir.Graph, positions: int) -> None:
        self.graph = graph
        self.positions = positions
        self._known: dict[str, ir.Value | None] = {}

    def of(self, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
        """The tables of a `RotaryEmbedding`; None where it needs more than the position."""
        found = [self._table(value) for value in node.inputs[1:3]]
        if found[0] is None or found[1] is None:
            return None
        return found[0], found[1]

    def _table(self, value: ir.Value | None) -> ir.Value | None:
        copied = _Copied(self.graph)
        result = None if value is None else copied.value(value)
        if result is None:
            return None
        key = copied.keys[result]
        if key not in self._known:
            table = self._evaluated(copied, result)
            self._known[key] = None if table is None else self._registered(table)
        return self._known[key]

    def _evaluated(self, copied: _Copied, result: ir.Value) -> Array | None:
        """[positions, half a head]; None where a position's row is not its own in every call."""
        every, some = np.arange(self.positions), np.arange(3, min(self.positions, 8))
        try:
            evaluate = copied.evaluator(result)
            table, part = evaluate(every), evaluate(some)
        except (RuntimeError, TypeError):  # an operator or a type that the evaluator does not know
            return None
        if table.shape[:-1] != (1, len(every)) or 2 * table.shape[-1] % _MULTIPLE:
            return None
        same = np.allclose(part.astype(np.float32), table[:, some].astype(np.float32), atol=1e-6)
        return table[0] if same else None

    def _registered(self, table: Array) -> ir.Value:
        # By content: peers share their weights by name, and need not have the same tables.
        name = f"{_TABLE}{hashlib.sha256(table.tobytes()).hexdigest()[:12]}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(stored(name, ir.tensor(table, name=name)))
        return self.graph.initializers[name]


class _Copied:
    """What makes a value, copied out of a graph; a batch's rows that are picked count as all.

    Args:
        graph: the main graph.

    Attributes:
        keys: by value of the copy, what it is computed from: equal keys, equal values.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {name: ir.Value(name=name) for name in _FED}
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.keys: dict[ir.Value, str] = {value: name for name, value in self.inputs.items()}
        self._made: dict[ir.Value, ir.Value | None] = {}

    def value(self, original: ir.Value) -> ir.Value | None:
        """The copy of a value; None where it comes from anything but `_FED` and constants."""
        if original not in self._made:
            self._made[original] = self._copy(original)
        return self._made[original]

    def _copy(self, original: ir.Value) -> ir.Value | None:
        if original.is_graph_input():
            return self.inputs.get(original.name or "")
        node = original.producer()
        if node is None:
            return self._constant(original)
        if any(each.type == ir.AttributeType.GRAPH for each in node.attributes.values()):
            return None
        if _picks_rows(node):
            assert node.inputs[0] is not None
            return self.value(node.inputs[0])
        inputs = [None if each is None else self.value(each) for each in node.inputs]
        if any(new is None for new, old in zip(inputs, node.inputs, strict=True) if old):
            return None
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        said = ", ".join(str(each.value) for each in node.attributes.values())
        read = ", ".join("" if each is None else self.keys[each] for each in inputs)
        for number, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name = f"{len(self.nodes)}.{number}"
            self.keys[new] = f"{node.op_type}.{number}[{said}]({read})"
            self._made[old] = new
        self.nodes.append(copy)
        return self._made[original]

    def _constant(self, original: ir.Value) -> ir.Value | None:
        tensor = original.const_value
        if tensor is None:
            return None
        copy = stored(f"constant.{len(self.initializers)}", tensor)
        digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()
        self.keys[copy] = f"{tensor.dtype}{tensor.shape.numpy()}{digest}"
        self.initializers.append(copy)
        return copy

    def evaluator(self, result: ir.Value) -> Any:
        """Gives the value for positions of one sequence, [positions] int64."""
        graph = ir.Graph(
            list(self.inputs.values()), [result], nodes=self.nodes,
            initializers=self.initializers, opset_imports=dict(self.graph.opset_imports),
            name="tables",
        )  # fmt: skip
        for value in self.inputs.values():
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None, None])
        model = ir.Model(graph, ir_version=10)
        return partial(_run, ReferenceEvaluator(ir.to_proto(model)))


def _run(evaluator: ReferenceEvaluator, positions: Array) -> Array:
    one = np.ones((1, len(positions)), dtype=np.int64)
    fed = dict(zip(_FED, (positions[None].astype(np.int64), one, one), strict=True))
    (result,) = evaluator.run(None, fed)
    return np.asarray(result)


def _picks_rows(node: ir.Node) -> bool:
    """Whether a node picks sequences of a batch by numbers that are computed."""
    if node.op_type != "Gather" or node.inputs[1] is None:
        return False
    axis = node.attributes.get("axis")
    numbers = node.inputs[1]
    maker = numbers.producer()
    computed = maker is not None and maker.op_type != "Constant"
    return computed and (axis is None or axis.as_int() == 0)


# -- projections ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """A product with a weight of the model's.

    Attributes:
        states: what is multiplied.
        weight: [outputs, inputs].
        bias: [outputs], or None.
        last: the node whose output it is.
    """

    states: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    last: ir.Node


def _projection(value: ir.Value | None, graph: ir.Graph) -> _Projection | None:
    last = None if value is None else value.producer()
    if value is None or last is None or len(value.uses()) > 1:
        return None
    product, bias = last, None
    if last.op_type == "Add":
        vectors = [each for each in last.inputs if each is not None and _stored(each, graph, 1)]
        others = [each for each in last.inputs if each not in vectors]
        maker = others[0].producer() if len(others) == 1 and others[0] is not None else None
        if maker is None or len(maker.outputs[0].uses()) > 1:
            return None
        product, bias = maker, vectors[0]
    if product.op_type != "MatMul":
        return None
    states, matrix = product.inputs
    turned = None if matrix is None else matrix.producer()
    if states is None or turned is None or turned.op_type != "Transpose":
        return None
    weight = turned.inputs[0]
    if weight is None or not _stored(weight, graph, 2):
        return None
    return _Projection(states, weight, bias, last)


def _stored(value: ir.Value, graph: ir.Graph, dimensions: int) -> bool:
    known = value.name in graph.initializers and value.const_value is not None
    return known and value.shape is not None and len(value.shape) == dimensions


def _joined(graph: ir.Graph, parts: list[ir.Value]) -> ir.Value:
    """Weights one below the other, read from the model when they are written."""
    names = [value.name or "" for value in parts]
    name = "+".join([names[0], *(".".join(each.split(".")[-2:]) for each in names[1:])])
    if name not in graph.initializers:
        tensors = [value.const_value for value in parts if value.const_value is not None]
        shapes = [tensor.shape.numpy() for tensor in tensors]
        shape = [sum(each[0] for each in shapes), *shapes[0][1:]]

        def values() -> Array:
            return np.concatenate([tensor.numpy() for tensor in tensors])

        graph.register_initializer(lazy(name, shape, tensors[0].dtype, values))
    return graph.initializers[name]
