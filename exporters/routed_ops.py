"""mskip's own ONNX operators, of the target "trt-plugin".

A plugin carries them out in TensorRT and does nothing for a sequence that skips. Everywhere else
they are what a function in the model file says, of standard operators: the same file runs in ONNX
Runtime, which computes every row and clears those that skip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.exporters.attention_choice import attention_as, require_choice
from mskip.exporters.graph_cache import buffer_mask
from mskip.exporters.layers import DOMAIN
from mskip.exporters.splicing import constant

LINEAR = "RoutedLinear"
"""(x [batch, positions, inner], weight [inner, outer], execute [batch] int32) -> [.., outer]."""
ATTENTION = "RoutedAttention"
"""(query, key, value, mask, execute [batch] int32, positions [batch, new] int64) with the shapes of
`mskip.exporters.routed_kernels.attention` -> [batch, new, heads, head dim]."""
_NAME = "mskip_routed"


# -- traced -----------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the buffers; lowering adds decisions and positions."""
    if others.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} has learned sinks, which the plugin's attention lacks.",
            "Export with --target trt (conditionals).",
        )
    batch, heads, new, dim = query.shape
    output: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{ATTENTION}",
        (query, key, value, attention_mask),
        {
            "scale": float(dim**-0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
            "window": int(sliding_window or 0),
        },
        dtype=query.dtype,
        shape=(batch, new, heads, dim),
        version=1,
    )
    return output, None


@contextlib.contextmanager
def routed_forms(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention leaves one node of ours for the duration of the block.

    Raises:
        ModelError: the architecture does not let its attention be chosen.
    """
    consequence = "the plugin cannot take its place"
    require_choice(model, consequence, "Export with --target trt (conditionals).")
    with attention_as(model, _NAME, _attention, buffer_mask):
        yield


# -- in standard operators ----------------------------------------------------------------------


def reference_functions(opset: int) -> list[ir.Function]:
    """What the operators compute, as functions of a model file."""
    return [_linear_function(opset), _attention_function(opset)]


def _cleared(body: tape.Tape, result: ir.Value, execute: ir.Value, axes: list[int]) -> ir.Value:
    """``result`` with zeros for the rows that skip."""
    open_ = body.op("Greater", [execute, constant(body, np.int32(0))])
    rows = body.op("Unsqueeze", [open_, constant(body, np.array(axes, dtype=np.int64))])
    nothing = body.op("CastLike", [constant(body, np.float32(0)), result])
    return body.op("Where", [rows, result, nothing])


def _linear_function(opset: int) -> ir.Function:
    x, weight, execute = (ir.Value(name=name) for name in ("x", "weight", "execute"))
    body = tape.Tape()
    product = body.op("MatMul", [x, weight])
    return _function(LINEAR, opset, [x, weight, execute], body, [product, execute], [1, 2], [])


def _attention_function(opset: int) -> ir.Function:
    names = "query", "key", "value", "mask", "execute", "positions"
    inputs = [ir.Value(name=name) for name in names]
    body = tape.Tape()
    references = {
        name: ir.RefAttr(name, name, ir.AttributeType.FLOAT) for name in ("scale", "softcap")
    }
    found = body.op("Attention", inputs[:4], references)
    turned = body.op("Transpose", [found], attributes={"perm": [0, 2, 1, 3]})
    attributes = [
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
        ir.Attr("softcap", ir.AttributeType.FLOAT, None),
        ir.Attr("window", ir.AttributeType.INT, None),
    ]
    return _function(ATTENTION, opset, inputs, body, [turned, inputs[4]], [1, 2, 3], attributes)


def _function(
    name: str,
    opset: int,
    inputs: list[ir.Value],
    body: tape.Tape,
    result: list[ir.Value],
    axes: list[int],
    attributes: list[ir.Attr],
) -> ir.Function:
    found, execute = result
    output = _cleared(body, found, execute, axes)
    graph = ir.Graph(inputs, [output], nodes=list(body.nodes), opset_imports={"": opset}, name=name)
    for number, node in enumerate(graph):
        for value in node.outputs:
            value.name = f"{node.op_type.lower()}.{number}"
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)
