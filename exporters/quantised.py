"""Weights of 8 or 4 bits: products with a constant matrix become `MatMulNBits`.

ONNX Runtime's own quantiser rounds the weights, in blocks of `BLOCK` along the axis that is
summed over, each with a scale and a zero point; its kernel multiplies them as they are. The pass
works on the graph before it is saved: a matrix is read, rounded and written, one after another,
and branches share it as they shared the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mskip.compressor.errors import MissingExtraError, ModelError
from mskip.exporters.contract import Weights
from mskip.exporters.fused import MICROSOFT
from mskip.exporters.splicing import lazy

BLOCK = 32
"""Weights that share a scale and a zero point."""
INT8_ACTIVATIONS = 4
"""Accuracy level of the kernel: activations are rounded to 8 bits, too, which doubles its speed."""
BITS: dict[Weights, int] = {"int8": 8, "int4": 4}

Array = npt.NDArray[Any]
Parts = Callable[[], Sequence[Array]]
"""Gives packed weights, scales and zero points."""


def quantise(matrix: Array, bits: int) -> tuple[Array, Array, Array]:
    """Round a matrix.

    Args:
        matrix: [summed, outputs] float32.
        bits: 8 or 4.

    Returns:
        Packed weights [outputs, blocks, BLOCK * bits / 8] uint8, scales [outputs, blocks]
        float32, zero points [outputs, blocks * bits / 8 rounded up] uint8, as `MatMulNBits`
        takes them.
    """
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(matrix)
    )
    return packed, scales, zeros


def quantise_products(graph: ir.Graph, weights: Weights) -> None:
    """Round every matrix that a product in the graph or its branches has as a constant.

    What stands for a skipped sublayer stays as it is, and so do embeddings, but for the ones
    that the head reads, too: these are looked up in the rounded matrix.

    Args:
        graph: the main graph, which has all initializers.
        weights: not "float".

    Raises:
        ModelError: the model's weights are not float32.
    """
    bits = BITS[weights]

    @lru_cache(maxsize=1)  # the three parts of a matrix are written one after another
    def parts(source: ir.Value, transposed: bool) -> tuple[Array, Array, Array]:
        assert source.const_value is not None
        matrix = source.const_value.numpy()
        return quantise(matrix.T if transposed else matrix, bits)

    for node in list(_products(graph)):
        source, transposed = _matrix(node, graph)
        if source is None or ".compensation." in (source.name or ""):
            continue
        if source.dtype != ir.DataType.FLOAT:
            raise ModelError(
                f"weights of {weights} are made from float32 ones; these are {source.dtype}.",
                "Set model.dtype to float32 and tune again.",
            )
        assert source.shape is not None
        rows, columns = source.shape.numpy()
        outputs, summed = (rows, columns) if transposed else (columns, rows)
        if summed < BLOCK:
            continue
        make = partial(parts, source, transposed)
        rounded = _rounded(graph, source.name or "", make, outputs, summed, bits)
        sizes = {"K": summed, "N": outputs, "accuracy_level": INT8_ACTIVATIONS}
        _put(node, "MatMulNBits", [node.inputs[0], *rounded], {**sizes, "bits": bits})
        if transposed and summed % BLOCK == 0:
            for reader in [use.node for use in source.uses() if use.idx == 0]:
                if reader.op_type == "Gather":
                    _look_up(graph, reader, rounded, bits)


def _products(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.domain == "" and node.op_type == "MatMul":
            yield node


def _matrix(node: ir.Node, graph: ir.Graph) -> tuple[ir.Value | None, bool]:
    """The constant of a product, and whether it lies transposed."""
    value = node.inputs[1]
    assert value is not None
    maker = value.producer()
    transposed = maker is not None and maker.op_type == "Transpose"
    if maker is not None and transposed:
        value = maker.inputs[0]
        assert value is not None
    known = value.name in graph.initializers and value.shape is not None and len(value.shape) == 2
    return (value if known else None), transposed


def _rounded(
    graph: ir.Graph, source: str, parts: Parts, outputs: int, summed: int, bits: int
) -> list[ir.Value]:
    """Packed weights, scales and zero points of a matrix, as initializers."""
    names = [f"{source}.{part}" for part in (f"int{bits}", "scales", "zeros")]
    if names[0] not in graph.initializers:
        blocks = -(-summed // BLOCK)
        sizes = [
            (outputs, blocks, BLOCK * bits // 8),
            (outputs, blocks),
            (outputs, -(-blocks * bits // 8)),
        ]
        for number, (name, shape) in enumerate(zip(names, sizes, strict=True)):
            dtype = ir.DataType.FLOAT if number == 1 else ir.DataType.UINT8
            graph.register_initializer(_shaped(name, shape, dtype, partial(_nth, parts, number)))
    return [graph.initializers[name] for name in names]


def _nth(parts: Parts, number: int) -> Array:
    return parts()[number]


def _shaped(
    name: str, shape: tuple[int, ...], dtype: ir.DataType, values: Callable[[], Array]
) -> ir.Value:
    return lazy(name, shape, dtype, lambda: values().reshape(shape))


def _look_up(graph: ir.Graph, node: ir.Node, rounded: list[ir.Value], bits: int) -> None:
    """Let an embedding that the head reads, too, be looked up in the rounded matrix."""
    packed, scales, zeros = rounded
    tensor = packed.const_value
    assert tensor is not None
    # The same numbers in two dimensions, as the lookup wants them.
    name = f"{packed.name}.rows"
    if name not in graph.initializers:
        rows, blocks, width = tensor.shape.numpy()
        shape = rows, blocks * width
        graph.register_initializer(_shaped(name, shape, ir.DataType.UINT8, tensor.numpy))
    inputs = [graph.initializers[name], node.inputs[1], scales, zeros]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    _put(node, "GatherBlockQuantized", inputs, {**axes, "bits": bits})


def _put(
    node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]
) -> None:
    """Put a node of ONNX Runtime's own in the place of another."""
    made = ir.node(
        kind, inputs, {**attributes, "block_size": BLOCK}, domain=MICROSOFT, name=node.name
    )
    old, new = node.outputs[0], made.outputs[0]
    new.type, name = old.type, old.name
    old.name = f"{name}.before"
    new.name = name
    owner = node.graph
    assert owner is not None
    owner.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    owner.remove(node, safe=True)
