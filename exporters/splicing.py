"""Putting traced graphs into one another with onnx-ir."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def bound(
    body: ir.Model,
    arguments: list[ir.Value],
    prefix: str,
    first: list[ir.Node] | None = None,
) -> ir.Graph:
    """A copy of ``body`` reading ``arguments`` from outside, as a graph without inputs.

    Args:
        body: what is copied.
        arguments: in the order of its inputs.
        prefix: of the names of nodes and values.
        first: nodes to stand before all others.
    """
    graph = body.graph.clone()
    inputs = list(graph.inputs)
    graph.inputs.clear()
    for value in graph.initializers.values():
        inputs = [each for each in inputs if each is not value]
    for formal, actual in zip(inputs, arguments, strict=True):
        ir.convenience.replace_all_uses_with(formal, actual, replace_graph_outputs=True)
    if first:
        graph.insert_before(graph[0], first)
    renamed(graph, prefix)
    return graph


def substitute(graph: ir.Graph, node: ir.Node, outputs: list[ir.Value]) -> None:
    """Let ``outputs`` take the places and names of a node's outputs, and remove the node."""
    for old, new in zip(node.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        name = old.name
        old.name = f"{name}.placeholder"
        new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def moved(from_: ir.Graph, into: ir.Graph) -> list[ir.Node]:
    """Take the nodes out of a graph, to be put into another, which is given its constants."""
    nodes, constants = list(from_), list(from_.initializers.values())
    from_.outputs.clear()
    from_.remove(nodes)
    from_.initializers.clear()
    for value in constants:
        into.register_initializer(value)
    return nodes


def renamed(graph: ir.Graph, prefix: str) -> None:
    graph.name = prefix
    for number, node in enumerate(graph):
        node.name = f"{prefix}{node.op_type}.{number}"
        for value in node.outputs:
            value.name = f"{prefix}{value.name or node.op_type}.{number}"
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        value.name = f"{prefix}{name}"
        graph.register_initializer(value)


def constant(into: tape.Tape, value: np.ndarray | np.generic) -> ir.Value:
    """A constant node on a tape."""
    return into.op("Constant", [], attributes={"value": ir.tensor(np.asarray(value))})


def stored(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A value for a graph's initializers."""
    kind = ir.TensorType(tensor.dtype)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=kind, const_value=tensor)


def lazy(
    name: str,
    shape: Sequence[int],
    dtype: ir.DataType,
    values: Callable[[], ir.TensorProtocol | npt.NDArray[Any]],
) -> ir.Value:
    """An initializer whose values are made only when it is written."""

    def load() -> ir.TensorProtocol:
        return ir.tensor(values(), name=name)

    return stored(name, ir.LazyTensor(load, dtype, ir.Shape(shape), name=name))


def initializer(name: str, parameter: Tensor, *, transposed: bool = False) -> ir.Value:
    """An initializer that is read from the model only when it is written."""
    shape = tuple(parameter.shape)

    def values() -> ir.TensorProtocol:
        found = parameter.detach().cpu()
        return TorchTensor(found.T.contiguous() if transposed else found.contiguous(), name=name)

    dtype = DTYPES[str(parameter.dtype).removeprefix("torch.")]
    return lazy(name, shape[::-1] if transposed else shape, dtype, values)
