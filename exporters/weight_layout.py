"""How weights lie in the file: each once, and the way that the products read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.traversal import RecursiveGraphIterator

from mskip.exporters.splicing import constant, lazy


def share_tied_head(graph: ir.Graph) -> None:
    """Let a head that is tied to the embedding read it as it lies, instead of a second copy.

    MatMul wants [hidden, vocabulary]; Gemm can read [vocabulary, hidden], but only has two
    dimensions, hence the reshapes around it.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers:
            continue
        readers = [use.node for use in weight.uses()]
        products = [use.node for use in node.outputs[0].uses()]
        if not any(reader.op_type == "Gather" for reader in readers) or len(products) != 1:
            continue
        (product,) = products
        hidden, output = product.inputs[0], product.outputs[0]
        assert hidden is not None
        assert weight.shape is not None
        rows, width = weight.shape.numpy()
        build = tape.Tape()
        flat = build.op("Reshape", [hidden, constant(build, np.array([-1, width]))])
        scores = build.op("Gemm", [flat, weight], attributes={"transB": 1})
        lead = build.op("Shape", [hidden], attributes={"start": 0, "end": 2})
        shape = build.op("Concat", [lead, constant(build, np.array([rows]))], {"axis": 0})
        logits = build.op("Reshape", [scores, shape])
        graph.insert_before(product, list(build.nodes))
        logits.type, name = output.type, output.name
        output.name = f"{name}.matmul"
        logits.name = name
        ir.convenience.replace_all_uses_with(output, logits, replace_graph_outputs=True)
        graph.remove([product, node], safe=True)


def fold_transposes(graph: ir.Graph) -> None:
    """Store weights the way MatMul reads them: a transpose of an initializer becomes one."""
    for node in list(RecursiveGraphIterator(graph)):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in graph.initializers:
            continue
        tensor = source.const_value
        if tensor is None or len(tensor.shape) != 2:
            continue
        name = f"{source.name}.T"
        if name not in graph.initializers:
            graph.register_initializer(_transposed(name, tensor))
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        owner = node.graph
        assert owner is not None
        owner.remove(node, safe=True)


def _transposed(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    def values() -> np.ndarray:
        return np.ascontiguousarray(tensor.numpy().T)

    return lazy(name, tensor.shape.numpy()[::-1], tensor.dtype, values)
