"""What a trace says in several nodes and needs no node for."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from mskip.exporters.fused import MICROSOFT


def cancel_reshapes(graph: ir.Graph) -> None:
    """Let what reads a reshaped value read the one that it was made from, where the shapes agree.

    A model splits heads and joins them again, and a fused kernel takes them joined: what lies
    between are reshapes of reshapes. Their shapes are computed at run time, so that no general
    optimiser sees that they cancel out; the trace knows by its symbols that they do.

    Args:
        graph: a trace, with the shapes of its values.
    """
    for node in list(graph):
        if not _reshapes(node) or node.outputs[0].is_graph_output():
            continue
        shape = _known(node.outputs[0])
        source = node.inputs[0]
        while source is not None:
            if shape is not None and _known(source) == shape:
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                break
            maker = source.producer()
            if maker is None or not _reshapes(maker):
                break
            if not _copies_axes(node):
                node.replace_input_with(0, maker.inputs[0])
            source = maker.inputs[0]


def _reshapes(node: ir.Node) -> bool:
    return node.op_type == "Reshape" and node.domain == ""


def _known(value: ir.Value) -> tuple[int | str, ...] | None:
    """Sizes and symbols of a shape; None where one has no name."""
    if value.shape is None:
        return None
    sizes = [each if isinstance(each, int) else each.value for each in value.shape]
    return None if None in sizes else tuple(sizes)  # type: ignore[arg-type]


def _copies_axes(node: ir.Node) -> bool:
    """Whether a size of 0 takes the input's axis, so that the input's shape matters."""
    return "allowzero" not in node.attributes or not node.attributes["allowzero"].as_int()


def fuse_sums_with_norms(graph: ir.Graph) -> None:
    """Let the sum of the residual stream and its norm be one node of ONNX Runtime's own.

    It reads what is summed once and writes both, where two nodes read and write it twice.

    Args:
        graph: its sums are of operands of one shape where a norm reads them, as residuals are.
    """
    for norm in list(graph):
        summed = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
        maker = None if summed is None else summed.producer()
        if summed is None or maker is None or maker.op_type != "Add" or maker.graph is not graph:
            continue
        if summed.is_graph_output() or any(_constant(value) for value in maker.inputs):
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*maker.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=MICROSOFT,
            num_outputs=4,
            name=norm.name,
        )
        result, _, _, total = fused.outputs
        for old, new in ((norm.outputs[0], result), (summed, total)):
            new.name, new.type, new.shape = f"{old.name}.fused", old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new)
        graph.insert_before(norm, fused)
        graph.remove([norm, maker], safe=True)


def unname_unwanted(graph: ir.Graph) -> None:
    """Leave out the outputs of fused norms that only training reads: an empty name says so."""
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for value in node.outputs[1:3]:
                value.name = ""


def unshadow(graph: ir.Graph) -> None:
    """Name what branches compute unlike anything outside of them, wherever it stands.

    ONNX Runtime refuses a value in a branch that is named like one of the graph around it, even one
    that comes after the branch; onnx-ir's own pass only looks at what comes before.
    """
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph for value in node.outputs}
    for node in RecursiveGraphIterator(graph):
        owner = node.graph
        if owner is graph or owner is None:
            continue
        for value in node.outputs:
            name, number = f"{owner.name}{value.name}", 0
            if not value.name or value.name not in taken:
                continue
            while name in taken:
                name, number = f"{owner.name}{value.name}.{number}", number + 1
            value.name = name
            taken.add(name)


def _constant(value: ir.Value | None) -> bool:
    """Whether an operand is a constant, such as a bias: no residual."""
    return value is None or value.is_initializer()


def before_branch(branch: ir.Graph, given: list[ir.Value], graph: ir.Graph) -> list[ir.Node]:
    """Take the nodes out of a branch that only read ``given``: every layer computes the same.

    They are named anew, since they run whatever is decided.

    Args:
        branch: reads ``given`` from outside.
        given: values of ``graph``.
        graph: is handed the constants of these nodes.

    Returns:
        The nodes, in order, to be put into ``graph``.
    """
    outside, taken = set(given), []
    for node in list(branch):
        inputs = [value for value in node.inputs if value is not None]
        constants = [value for value in inputs if value.is_initializer() and value.graph is branch]
        if any(value not in outside and value not in constants for value in inputs):
            continue
        if any(value.is_graph_output() for value in node.outputs) or not inputs:
            continue
        for value in constants:
            assert value.name is not None
            if value.name in branch.initializers:
                branch.initializers.pop(value.name)
                graph.register_initializer(value)
        branch.remove(node)
        node.name = f"before.{node.name}"
        outside.update(node.outputs)
        outside.update(constants)
        taken.append(node)
    return taken


def into_branch(branch: ir.Graph, values: list[ir.Value]) -> None:
    """Move what makes ``values`` into the branch, where nothing else reads them.

    Args:
        branch: reads ``values`` from outside.
        values: of the graph around it.
    """
    inside = set(branch)
    for value in values:
        maker = value.producer()
        if maker is None or len(maker.outputs) > 1 or value.is_graph_output():
            continue
        if all(use.node in inside for use in value.uses()):
            assert maker.graph is not None
            maker.graph.remove(maker)
            branch.insert_before(branch[0], maker)
            inside.add(maker)
