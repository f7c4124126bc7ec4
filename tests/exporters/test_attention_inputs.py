"""What a fused attention is given, on graphs written by hand: `test_fused` runs whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from mskip.exporters.attention_inputs import has_tables, join_projections, rotate_inside

POSITIONS, HALF = 40, 8
CONSTANT = ["frequencies", "q_weight", "k_weight", "v_weight"]

BY_POSITION = """
    wide = Unsqueeze(position_ids, one)
    numbers = Cast<to=1>(wide)
    angles = Mul(numbers, frequencies)
"""
BY_LENGTH = """
    seen = ReduceSum<keepdims=1>(attention_mask)
    places = Add(position_ids, seen)
    wide = Unsqueeze(places, one)
    numbers = Cast<to=1>(wide)
    angles = Mul(numbers, frequencies)
"""
ELSEWHERE = """
    angles = Identity(given)
"""


def graph_of(angles: str, weights: str = "", half: int = HALF) -> ir.Model:
    """An attention whose heads are turned by the cosines and sines of ``angles``."""
    text = f"""
        <ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
        whole (int64[batch, new] position_ids, int64[batch, all] attention_mask,
               float[batch, new, {half}] given, float[batch, new, 24] hidden,
               float[batch, 1, room, {2 * half}] past_key,
               float[batch, 1, room, {2 * half}] past_value,
               int32[batch] last, int32 columns, float[{half}] frequencies,
               float[{4 * half}, 24] q_weight, float[{2 * half}, 24] k_weight,
               float[{2 * half}, 24] v_weight)
            => (float[batch, new, {4 * half}] output)
        <int64[1] one = {{2}}>
        {{
            {angles}
            cosines = Cos(angles)
            sines = Sin(angles)
            turned_q = Transpose<perm=[1, 0]>(q_weight)
            turned_k = Transpose<perm=[1, 0]>(k_weight)
            turned_v = Transpose<perm=[1, 0]>(v_weight)
            queries = MatMul(hidden, turned_q)
            keys = MatMul(hidden, turned_k)
            values = MatMul(hidden, turned_v)
            q = RotaryEmbedding<num_heads=2>(queries, cosines, sines)
            k = RotaryEmbedding<num_heads=1>(keys, cosines, sines)
            output, key, value = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(
                q, k, values, past_key, past_value, last, columns)
        }}
    """
    rng = np.random.default_rng(0)
    model = ir.from_proto(parser.parse_model(text))
    for value in [each for each in model.graph.inputs if (each.name or "") in CONSTANT]:
        assert value.shape is not None
        array = rng.standard_normal(value.shape.numpy()).astype(np.float32)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, half: int = HALF) -> Any:
    """Of two sequences that have 6 and 3 tokens, 2 of them new."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((2, 1, 24)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 1, 16, 2 * half)).astype(np.float32)
    feeds = {
        "position_ids": np.array([[6], [3]]),
        "attention_mask": np.ones((2, 7), np.int64),
        "given": np.ones((2, 1, half), np.float32),
        "hidden": hidden,
        "past_key": key,
        "past_value": value,
        "last": np.array([6, 3], np.int32),
        "columns": np.array(7, np.int32),
    }
    names = {each.name for each in session.get_inputs()}
    return session.run(None, {name: each for name, each in feeds.items() if name in names})[0]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_rotation_by_position_goes_into_the_kernel() -> None:
    model = graph_of(BY_POSITION)
    expected = run(model)
    rotate_inside(model.graph, POSITIONS)
    join_projections(model.graph)
    assert kinds(model) == ["Transpose", "MatMul", "GroupQueryAttention"]
    assert has_tables(model.graph)
    tables = [v for n, v in model.graph.initializers.items() if n.startswith("rotary.")]
    assert [table.shape for table in tables] == [(POSITIONS, HALF)] * 2
    found = run(model)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("angles", "half"),
    [(BY_LENGTH, HALF), (ELSEWHERE, HALF), (BY_POSITION, 4)],
    ids=["by length", "handed in", "narrow heads"],
)
def test_another_rotation_stays_as_it_is(angles: str, half: int) -> None:
    """Also where the table of every position would be right for a call of all positions."""
    model = graph_of(angles, half=half)
    before = kinds(model)
    rotate_inside(model.graph, POSITIONS)
    join_projections(model.graph)
    assert kinds(model) == before
    assert not has_tables(model.graph)


def test_products_of_other_states_stay_apart() -> None:
    model = graph_of(BY_POSITION)
    rotate_inside(model.graph, POSITIONS)
    values = next(node for node in model.graph if node.outputs[0].name == "values")
    other = ir.node("Identity", [values.inputs[0]])
    model.graph.insert_before(values, other)
    values.replace_input_with(0, other.outputs[0])
    join_projections(model.graph)
    assert kinds(model).count("MatMul") == 3


def test_tables_are_named_by_what_is_in_them() -> None:
    """Peers take weights from one file by name: another table needs another name."""
    names = []
    for scale in (1.0, 1.0, 0.5):
        model = graph_of(BY_POSITION)
        frequencies = model.graph.initializers["frequencies"]
        assert frequencies.const_value is not None
        array = frequencies.const_value.numpy() * np.float32(scale)
        frequencies.const_value = ir.tensor(array, name="frequencies")
        rotate_inside(model.graph, POSITIONS)
        names.append({name for name in model.graph.initializers if name.startswith("rotary.")})
    assert names[0] == names[1]
    assert not names[0] & names[2]
