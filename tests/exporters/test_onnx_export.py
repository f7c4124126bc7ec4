"""The exported graphs, read node by node: what is where, once, and lazily."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ModelError
from mskip.exporters import onnx_export
from mskip.exporters.contract import CONTRACT, read_contract
from mskip.exporters.onnx_export import (
    CEILING,
    DATA,
    DENSE,
    MODEL,
    STATIC,
    export_onnx,
    export_run,
    static_peer_layers,
)

if TYPE_CHECKING:
    from conftest import Exported

GRAPHS = [MODEL, DENSE, STATIC, CEILING]


@pytest.fixture(scope="session", params=["exported", "exported_tied"])
def export(request: pytest.FixtureRequest) -> Exported:
    """Each export in turn."""
    value: Exported = request.getfixturevalue(request.param)
    return value


def load(folder: Path, name: str = MODEL) -> ModelProto:
    return onnx.load(folder / name, load_external_data=False)


def contract_file(name: str) -> str:
    return CONTRACT if name == MODEL else name.replace(".onnx", ".contract.json")


def branches(node: NodeProto) -> dict[str, GraphProto]:
    return {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}


def every_node(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for branch in branches(node).values():
            yield from every_node(branch)


def attention_ifs(graph: GraphProto) -> dict[int, dict[str, GraphProto]]:
    """What each routed attention is where every row executes, some rows do, none does, by layer."""
    found = {}
    for node in graph.node:
        if node.op_type == "If" and node.name.endswith(".attention"):
            outer = branches(node)
            *looked_up, inner = outer["else_branch"].node
            assert [each.op_type for each in looked_up] == ["Or"]  # decided here, or handed in
            sides = branches(inner)
            found[int(node.name.split(".")[2])] = {
                "every": outer["then_branch"],
                "some": sides["then_branch"],
                "none": sides["else_branch"],
            }
    return found


def location(tensor: TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries["offset"]), int(entries["length"])


# -- interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_checker_passes(export: Exported, name: str) -> None:
    onnx.checker.check_model(export.folder / name, full_check=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_interface_is_the_contract(export: Exported, name: str) -> None:
    graph = load(export.folder, name).graph
    contract = read_contract(export.folder / contract_file(name))
    for specs, values in ((contract.inputs(), graph.input), (contract.outputs(), graph.output)):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            tensor = value.type.tensor_type
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == spec.dtype
            axes = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            assert axes == spec.axes, spec.name


def test_contracts_say_what_was_exported(export: Exported) -> None:
    routed = export.run.recipe().routing.layers
    config = export.base.model.config
    assert export.contract.routed_layers == routed
    assert export.contract.tau == export.run.calibration()["tau"]
    assert export.contract.layers == config.num_hidden_layers
    assert export.contract.vocabulary == config.vocab_size
    assert export.contract.eos == [config.eos_token_id]
    assert export.contract.pad == config.pad_token_id
    removed = {
        name: read_contract(export.folder / contract_file(name)).removed_layers for name in GRAPHS
    }
    assert removed[MODEL] == removed[DENSE] == []
    assert removed[CEILING] == routed
    assert removed[STATIC] == export.report["static_removed"]


def test_tau_may_be_left_out(exported: Exported) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.folder / MODEL)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 300, (12, 6))
    contract = exported.contract
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(6)[None].repeat(12, axis=0),
        "routing": np.full((12, 3), -1),
    }
    for spec in contract.inputs()[5:]:
        feeds[spec.name] = np.zeros((12, contract.kv_heads, 0, contract.head_dim), np.float32)

    def run(**tau: Any) -> list[Any]:
        outputs: list[Any] = session.run(["routing_out", "logits"], {**feeds, **tau})
        return outputs

    default = run()
    calibrated = run(tau=np.asarray(contract.tau, dtype=np.float32))
    assert (default[0] == calibrated[0]).all()
    assert (default[1] == calibrated[1]).all()
    assert 0 < default[0].mean() < 1
    assert run(tau=np.zeros(3, np.float32))[0].all()


@pytest.mark.parametrize("name", GRAPHS)
def test_standard_operators_of_the_asked_opset_only(export: Exported, name: str) -> None:
    model = load(export.folder, name)
    asked = export.run.recipe().export.opset
    assert [(each.domain, each.version) for each in model.opset_import] == [("", asked)]
    assert {node.domain for node in every_node(model.graph)} <= {"", "ai.onnx"}
    assert not model.functions


@pytest.mark.parametrize("name", [*GRAPHS, CONTRACT])
def test_nothing_tells_where_it_was_made(export: Exported, name: str) -> None:
    content = (export.folder / name).read_bytes()
    for path in (onnx_export.__file__, np.__file__, onnx.__file__):
        assert str(Path(path).parent).encode() not in content
    assert b"stack_trace" not in content


# -- laziness ---------------------------------------------------------------------------------


def test_one_conditional_per_routed_attention(export: Exported) -> None:
    graph = load(export.folder).graph
    assert list(attention_ifs(graph)) == export.contract.routed_layers
    assert export.report["if_nodes"] == len(export.contract.routed_layers)


def test_conditions_are_scalar_booleans(export: Exported) -> None:
    model = onnx.shape_inference.infer_shapes(load(export.folder), strict_mode=True)
    known = {value.name: value.type.tensor_type for value in model.graph.value_info}
    conditions = [known[n.input[0]] for n in model.graph.node if n.op_type == "If"]
    # Attention and score of each, which tokens are scored, and what was decided.
    assert len(conditions) == 2 * len(export.contract.routed_layers) + 2
    for condition in conditions:
        assert condition.elem_type == TensorProto.BOOL
        assert condition.HasField("shape")
        assert len(condition.shape.dim) == 0


def test_attention_runs_only_inside_its_then_branch(export: Exported) -> None:
    graph = load(export.folder).graph
    dense = export.contract.layers - len(export.contract.routed_layers)
    assert sum(node.op_type == "Softmax" for node in graph.node) == dense
    for layer, sides in attention_ifs(graph).items():
        for side in ("every", "some"):
            operators = Counter(node.op_type for node in every_node(sides[side]))
            assert operators["Softmax"] == 1
            assert operators["MatMul"] == 6  # q, k, v, scores, values, o
        weights = f"layers.{layer}.attention."
        readers = [
            node.name for node in every_node(graph) if any(weights in name for name in node.input)
        ]
        assert len(readers) == 2 * 4
        assert all(name.startswith(f"layers.{layer}.attention/") for name in readers)
        # Keys and values of a routed layer are not touched outside either.
        past = f"past_key_values.{layer}."
        outside = [
            node.op_type for node in graph.node if any(name.startswith(past) for name in node.input)
        ]
        assert set(outside) <= {"Shape"}


def test_rows_that_all_execute_are_not_picked(export: Exported) -> None:
    for sides in attention_ifs(load(export.folder).graph).values():
        kinds = {name: {node.op_type for node in every_node(side)} for name, side in sides.items()}
        picking = {"NonZero", "Gather", "ScatterND"}
        assert not picking & kinds["every"]
        assert picking <= kinds["some"]


def test_a_decided_call_only_looks_its_decisions_up(export: Exported) -> None:
    graph = load(export.folder).graph
    decisions = [n for n in graph.node if n.op_type == "If" and "Decision" in n.name]
    assert len(decisions) == len(export.contract.routed_layers)
    for node in decisions:
        known = Counter(each.op_type for each in branches(node)["else_branch"].node)
        del known["Constant"]
        assert known == {"Gather": 1}
        # What the decision is taken from is fetched where it is taken.
        assert "Gather" in {each.op_type for each in branches(node)["then_branch"].node}


def test_a_decided_call_repeats_what_it_was_given(export: Exported) -> None:
    """Nothing is put together from the layers, where nothing was decided in them."""
    graph = load(export.folder).graph
    routed = len(export.contract.routed_layers)
    (report,) = (node for node in graph.node if node.name == "if.reported")
    assert list(report.output) == ["routing_out", "routing_scores"]
    taken, given = (branches(report)[f"{side}_branch"].node for side in ("then", "else"))
    assert Counter(node.op_type for node in taken)["Unsqueeze"] == 2 * routed
    assert {node.op_type for node in given} == {"Identity", "Shape", "ConstantOfShape"}
    (prompt,) = (node for node in graph.node if node.name == "if.prompt")
    assert "Slice" in {node.op_type for node in branches(prompt)["then_branch"].node}
    assert {node.op_type for node in branches(prompt)["else_branch"].node} == {"Constant"}


def test_the_skipped_side_only_looks_at_shapes(export: Exported) -> None:
    graph = load(export.folder).graph
    shapes = {name for node in graph.node if node.op_type == "Shape" for name in node.output}
    for sides in attention_ifs(graph).values():
        nodes = list(sides["none"].node)
        made = {name for node in nodes for name in node.output}
        assert {node.op_type for node in nodes} <= {
            "Constant", "Shape", "Concat", "Expand", "ConstantOfShape", "Identity",
        }  # fmt: skip
        for node in nodes:
            outer = [name for name in node.input if name not in made]
            assert shapes.issuperset(outer) or node.op_type == "Shape", node
            assert not any(name.startswith("past_key_values") for name in outer)
        # The one Identity gives the empty cache a second name.
        empty = {node.output[0] for node in nodes if node.op_type == "ConstantOfShape"}
        assert all(n.input[0] in empty for n in nodes if n.op_type == "Identity")


@pytest.mark.parametrize("name", [DENSE, STATIC, CEILING])
def test_peers_have_no_conditionals_and_just_their_attention(export: Exported, name: str) -> None:
    operators = Counter(node.op_type for node in every_node(load(export.folder, name).graph))
    contract = read_contract(export.folder / contract_file(name))
    assert operators["If"] == 0
    assert operators["Softmax"] == contract.layers - len(contract.removed_layers)


# -- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_no_weight_inside_a_branch_or_the_graph_file(export: Exported, name: str) -> None:
    graph = load(export.folder, name).graph
    for node in every_node(graph):
        for branch in branches(node).values():
            assert all(np.prod(tensor.dims) <= 8 for tensor in branch.initializer)
            assert not branch.sparse_initializer
        if node.op_type == "Constant":
            (value,) = node.attribute
            assert np.prod(value.t.dims) <= 8
    # A vector of norm weights may lie in the graph; a matrix may not.
    inline = [tensor for tensor in graph.initializer if not tensor.external_data]
    assert max(np.prod(tensor.dims) for tensor in inline) <= 32


def test_every_weight_is_stored_once(export: Exported) -> None:
    parts = [location(t) for t in load(export.folder).graph.initializer if t.external_data]
    matrices = [p for p in export.base.model.parameters() if p.ndim == 2]
    assert sorted(length for _, _, length in parts) == sorted(p.nbytes for p in matrices)
    total = (export.folder / DATA).stat().st_size
    weights = sum(p.nbytes for p in matrices)
    assert weights <= total <= weights + 4096 * 2  # alignment
    spans = sorted((offset, offset + length) for _, offset, length in parts)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_tied_head_reads_the_embedding(exported_tied: Exported) -> None:
    graph = load(exported_tied.folder).graph
    config = exported_tied.base.model.config
    size = {config.vocab_size, config.hidden_size}
    (embedding,) = [t.name for t in graph.initializer if set(t.dims) == size]
    readers = [node.op_type for node in graph.node if embedding in node.input]
    assert sorted(readers) == ["Gather", "Gemm"]


@pytest.mark.parametrize("name", [DENSE, STATIC, CEILING])
def test_peers_share_the_weight_file(export: Exported, name: str) -> None:
    def stored(graph: str) -> dict[str, tuple[str, int, int]]:
        tensors = load(export.folder, graph).graph.initializer
        return {t.name: location(t) for t in tensors if t.external_data}

    own, peer = stored(MODEL), stored(name)
    assert {where for where, _, _ in peer.values()} == {DATA}
    assert peer.items() <= own.items()
    gone = 4 * len(read_contract(export.folder / contract_file(name)).removed_layers)
    assert len(own) - len(peer) == gone
    assert [path.name for path in export.folder.glob("*.data")] == [DATA]


# -- the step ---------------------------------------------------------------------------------


def test_the_report_is_saved(exported: Exported) -> None:
    report = exported.run.report("export", "")
    assert report == exported.report
    assert report["checker"] == "passed"
    assert report["opset"] == 21
    assert report["weights_bytes"] == sum(p.nbytes for p in exported.base.model.parameters())
    manifest = json.loads((exported.run.path / "manifest.json").read_text("utf-8"))
    assert manifest["onnx"] == {"sha256": report["sha256"], "opset": 21}
    assert (exported.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("capacity", "removed"),
    [(1.0, []), (0.67, []), (0.66, [3]), (0.5, [3]), (0.3, [2, 3]), (0.0, [1, 2, 3])],
)
def test_static_peer_loses_the_least_sensitive(
    exported: Exported, capacity: float, removed: list[int]
) -> None:
    assert static_peer_layers(exported.run, exported.routers.layers, capacity) == removed


def test_every_layer_routed_is_refused(exported: Exported, tmp_path: Path) -> None:
    from mskip.compressor.router import Routers

    routers = Routers([0, 1, 2, 3], 32)
    contract = replace(exported.contract, routed_layers=routers.layers)
    with pytest.raises(ModelError, match=r"every layer is routed[\s\S]*exclude_last"):
        export_onnx(exported.base, routers, contract, tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_the_old_one(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported.run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    old = {path.name: b"old" for path in run.onnx.iterdir()}
    for name, content in old.items():
        (run.onnx / name).write_bytes(content)

    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        if note == "checking":  # All graphs are written.
            raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, "trace", lambda *_: exported.traced)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, exported.base, interrupt)
    assert {path.name: path.read_bytes() for path in run.onnx.iterdir()} == old
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]
    export_run(run, exported.base)
    assert (run.onnx / MODEL).read_bytes() == (exported.folder / MODEL).read_bytes()


def test_the_model_is_left_as_it_was(exported: Exported, tiny_folder: Path) -> None:
    import torch

    from mskip.compressor.models import load_base

    fresh = load_base(exported.run.recipe().model).model
    model = exported.base.model
    assert model.config._attn_implementation == fresh.config._attn_implementation
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
