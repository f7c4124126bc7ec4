"""Weights where ONNX Runtime packs them.

It rearranges the weights of a product when it loads a graph, those of the main graph for the
branches of an `If` too, but not for the branches of an `If` within: there it would rearrange them
with every call. A routed sublayer that only some rows execute lies that deep, so the branch around
it gets weights of its own. They are the same bytes of the same file.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator


def own_weights(path: Path) -> int:
    """Give branches that hold an `If` the weights that are read within it; writes the file anew.

    Args:
        path: of an ONNX file, whose weights lie in a file beside it and stay there.

    Returns:
        How many weights there are twice.
    """
    model = ir.load(path)
    count = 0
    for node in model.graph:
        for branch in _branches(node):
            if any(_branches(inner) for inner in branch):
                count += _own(branch, model.graph)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            assert value.name is not None
            del model.graph.initializers[value.name]
    ir.save(model, path)
    return count


def _branches(node: ir.Node) -> list[ir.Graph]:
    return [each.as_graph() for each in node.attributes.values() if each.type.name == "GRAPH"]


def _own(branch: ir.Graph, graph: ir.Graph) -> int:
    made: dict[ir.Value, ir.Value] = {}
    for node in RecursiveGraphIterator(branch):
        if node.op_type == "GroupQueryAttention":  # its tables are not rearranged
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.graph is not graph or not value.is_initializer():
                continue
            if value.const_value is None or len(value.const_value.shape) < 2:
                continue
            if value not in made:
                made[value] = _copy(value, f"{branch.name}{value.name}")
                branch.register_initializer(made[value])
            node.replace_input_with(index, made[value])
    return len(made)


def _copy(value: ir.Value, name: str) -> ir.Value:
    """A value of the same tensor; in a file, if it is in one."""
    tensor = value.const_value
    assert tensor is not None
    same: ir.TensorProtocol
    if isinstance(tensor, ir.ExternalTensor):
        same = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=tensor.base_dir,
        )
    else:
        same = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=same)
