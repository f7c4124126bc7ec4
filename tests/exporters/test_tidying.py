"""Graphs that a trace or a lowering left, made fit for runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_a_branch_names_nothing_like_the_graph_around_it(tmp_path: Path) -> None:
    """Not even like what comes after it: ONNX Runtime refuses such a file."""
    import numpy as np
    import onnx_ir as ir

    from mskip.exporters.tidying import unshadow

    onnxruntime = pytest.importorskip("onnxruntime")

    def constant(name: str, value: float) -> ir.Node:
        tensor = ir.tensor(np.float32(value))
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
        return ir.node("Constant", [], {"value": tensor}, outputs=[output], name=f"node.{value}")

    condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
    branches = {}
    for branch, value in (("then_branch", 1.0), ("else_branch", 2.0)):
        node = constant("val_0", value)
        branches[branch] = ir.Graph([], node.outputs, nodes=[node], name=f"{branch}/")
    chosen = ir.node("If", [condition], branches, num_outputs=1)
    after = constant("val_0", 3.0)
    total = ir.node("Add", [chosen.outputs[0], after.outputs[0]])
    total.outputs[0].name, chosen.outputs[0].name = "total", "chosen"
    total.outputs[0].type, total.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
    graph = ir.Graph(
        [condition], total.outputs, nodes=[chosen, after, total], opset_imports={"": 20}, name="g"
    )
    path = tmp_path / "model.onnx"

    def result() -> list[float]:
        ir.save(ir.Model(graph, ir_version=10), path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return [float(session.run(None, {"condition": np.array(c)})[0]) for c in (True, False)]

    with pytest.raises(Exception, match="single static assignment"):
        result()
    unshadow(graph)
    assert result() == [4.0, 5.0]
    names = {node.outputs[0].name for each in branches.values() for node in each}
    assert len(names) == 2
    assert "val_0" not in names
