"""What a call of a graph has to do at least: operations and bytes, counted from its nodes.

Counted are the products with weights and the attention, and of memory the weights, the keys and
values and the embedding's rows. Nodes that work element by element are not: they do little, and
what passes between nodes can stay in caches. So the counts are a bound from below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mskip.compressor.errors import ArtifactError
from mskip.exporters.contract import read_contract
from mskip.exporters.ort_runner import contract_path
from mskip.exporters.quantised import BLOCK

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
_PASSING = {"Reshape", "Cast", "Mul", "Div", "Tanh"}
"""What may stand between the head and the logits."""


@dataclass(frozen=True)
class Call:
    """Sizes of a call.

    Attributes:
        batch: sequences.
        new: positions that each is given.
        past: positions that each has already.
        kept: positions of each whose logits are computed.
    """

    batch: int
    new: int
    past: int = 0
    kept: int = 1


@dataclass(frozen=True)
class Work:
    """A lower bound.

    Attributes:
        flops: additions and multiplications of floats.
        weight_bytes: read once, however many sequences there are.
        cache_bytes: keys and values, read and written.
    """

    flops: int
    weight_bytes: int
    cache_bytes: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.cache_bytes

    def seconds(self, flops_rate: float, bandwidth: float) -> float:
        """At least so long on a machine with these rates, per second (the roofline)."""
        return max(self.flops / flops_rate, self.bytes / bandwidth)


def work_of(folder: Path, file: str, call: Call) -> Work:
    """Count a static graph of the target "ort": every node runs in every call.

    Args:
        folder: an export.
        file: such as ``dense.onnx``; weights are not read.
        call: sizes.

    Raises:
        ArtifactError: a conditional graph, or one of another target, whose nodes do not say what
            they do.
    """
    contract = read_contract(contract_path(folder, file))
    if contract.target != "ort" or contract.routed_layers:
        raise ArtifactError(
            f"{folder / file} is not a static graph of the target ort.",
            "Count its dense or ceiling graph, made with: mskip export --target ort",
        )
    graph = ir.load(folder / file).graph
    width = _WIDTHS[contract.dtype]
    rows = call.batch * call.new
    head = _head(graph)
    flops = weight_bytes = cache_bytes = 0
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            pairs, columns = _attended(node, call)
            flops += 4 * node.attributes["num_heads"].as_int() * contract.head_dim * pairs
            kept = contract.kv_heads * contract.head_dim * 2 * width
            cache_bytes += kept * call.batch * (columns + call.new)
        elif node.op_type == "Gather" and (table := _matrix(node)):
            weight_bytes += rows * table[1] * width
        elif product := _product(node, width):
            inputs, outputs, size = product
            weight_bytes += size
            flops += 2 * inputs * outputs * (call.batch * call.kept if node is head else rows)
    return Work(flops, weight_bytes, cache_bytes)


def _attended(node: ir.Node, call: Call) -> tuple[int, int]:
    """Pairs of a new and a visible position over the batch; columns that are read of each row."""
    window = node.attributes.get("local_window_size")
    limit = call.past + call.new if window is None else window.as_int()
    visible = (min(call.past + number, limit) for number in range(1, call.new + 1))
    columns = min(call.past + call.new, limit + call.new - 1)
    return call.batch * sum(visible), columns


def _product(node: ir.Node, width: int) -> tuple[int, int, int] | None:
    """Summed and given columns and bytes of a product with a constant matrix; None of others."""
    if node.op_type == "MatMulNBits":
        inputs, outputs, bits = (node.attributes[name].as_int() for name in ("K", "N", "bits"))
        scales = outputs * -(-inputs // BLOCK)
        return inputs, outputs, outputs * inputs * bits // 8 + scales * width
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    matrix = _matrix(node)
    if matrix is None:
        return None
    rows, columns = matrix
    return (*matrix, rows * columns * width)


def _matrix(node: ir.Node) -> tuple[int, int] | None:
    """Shape of a weight matrix among a node's inputs."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.const_value is not None:
            shape = value.const_value.shape.numpy()
            if len(shape) == 2:
                return shape[0], shape[1]
    return None


def _head(graph: ir.Graph) -> ir.Node | None:
    """The product that the logits come from."""
    (logits,) = (value for value in graph.outputs if value.name == "logits")
    return next((node for node in _makers(logits) if node.op_type not in _PASSING), None)


def _makers(value: ir.Value | None) -> Iterator[ir.Node]:
    while value is not None and (maker := value.producer()) is not None:
        yield maker
        value = maker.inputs[0]
