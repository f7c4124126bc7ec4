"""The contract says what the graph is, and a damaged one is refused with one message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mskip.compressor.errors import ArtifactError
from mskip.exporters.contract import Contract, read_contract

ROUTED = Contract(
    layers=4,
    routed_layers=[1, 3],
    kv_heads=2,
    head_dim=8,
    vocabulary=97,
    dtype="float32",
    opset=20,
    tau=[0.25, 0.75],
    eos=[2, 5],
    pad=0,
    removed_layers=[],
)
DENSE = replace(ROUTED, routed_layers=[], tau=[])
STATIC = replace(DENSE, removed_layers=[3])


@pytest.mark.parametrize("contract", [ROUTED, DENSE, STATIC], ids=["routed", "dense", "static"])
def test_round_trip(contract: Contract, tmp_path: Path) -> None:
    contract.write(tmp_path / "contract.json")
    assert read_contract(tmp_path / "contract.json") == contract


def test_the_file_spells_out_every_tensor(tmp_path: Path) -> None:
    ROUTED.write(tmp_path / "contract.json")
    value = json.loads((tmp_path / "contract.json").read_text("utf-8"))
    assert [each["name"] for each in value["inputs"]] == [s.name for s in ROUTED.inputs()]
    assert [each["name"] for each in value["outputs"]] == [s.name for s in ROUTED.outputs()]
    assert value["inputs"][4] == {
        "name": "tau",
        "dtype": "float32",
        "axes": [2],
        "optional": True,
    }
    assert value["routing_values"] == {"undecided": -1, "skip": 0, "execute": 1}
    assert value["unscored"] == -1.0


def test_axes_of_routed_and_dense_layers() -> None:
    inputs = {spec.name: spec for spec in ROUTED.inputs()}
    outputs = {spec.name: spec for spec in ROUTED.outputs()}
    assert inputs["past_key_values.0.key"].axes == ["batch", 2, "past", 8]
    assert inputs["past_key_values.3.value"].axes == ["rows_3", 2, "past", 8]
    assert outputs["present.1.key"].axes == ["rows_1", 2, "past + sequence", 8]
    assert outputs["present.2.value"].axes == ["batch", 2, "past + sequence", 8]
    assert inputs["input_ids"].axes == ["batch", "sequence"]
    assert inputs["attention_mask"].axes == ["batch", "past + sequence"]
    assert inputs["routing"].axes == outputs["routing_out"].axes == ["batch", 2]
    assert outputs["routing_scores"].dtype == "float32"
    assert outputs["logits"].axes == ["batch", "sequence", 97]
    assert [name for name, spec in inputs.items() if spec.optional] == ["tau"]


@pytest.mark.parametrize("contract", [DENSE, STATIC], ids=["dense", "static"])
def test_a_graph_without_routing_has_no_routing_tensors(contract: Contract) -> None:
    names = [spec.name for spec in (*contract.inputs(), *contract.outputs())]
    assert not [name for name in names if name.startswith(("routing", "tau"))]
    cached = [name for name in names if name.startswith("present.") and name.endswith(".key")]
    kept = [layer for layer in range(4) if layer not in contract.removed_layers]
    assert cached == [f"present.{layer}.key" for layer in kept]
    assert contract.cached_layers == kept


def test_a_missing_contract_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no contract at .*\n.*mskip export"):
        read_contract(tmp_path / "contract.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "lacks the entry"),
        ("null", "lacks the entry"),
        ("{}", "'format'"),
        ('{"format": 1}', "format 1; this mskip reads 6"),
        ('{"format": 6, "layers": 4}', "'routed_layers'"),
    ],
)
def test_a_damaged_contract_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "contract.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_contract(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy
