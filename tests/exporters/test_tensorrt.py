"""Engines built by the real TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tiny_export import CAPACITY, ROUTED, exported

if TYPE_CHECKING:
    from mskip.exporters.trt_builders import Chosen

SIZES = f"batch=1,2,4 seq=1,8,16 context={CAPACITY}"


@pytest.fixture(scope="module")
def rtx() -> Chosen:
    from mskip.exporters.trt_builders import BUILDERS, choose

    (row,) = [row for row in BUILDERS if row.crosses]
    if row.module() is None:
        pytest.skip(f"not installed: {row.install}")
    return choose("tensorrt-rtx", ["8.9", "12.0"])


def build_of(rtx: Chosen, **settings: Any) -> Any:
    from mskip.exporters.trt_engine import Build
    from mskip.exporters.trt_profile import parse_profile

    return Build(rtx, parse_profile(SIZES), **{"capabilities": ["8.9", "12.0"], **settings})


@pytest.fixture(scope="module")
def graph(make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    exported(folder, make_tokenizer())
    return folder


def test_engine_of_a_routed_graph(rtx: Chosen, graph: Path) -> None:
    """Every product of a routed sublayer hangs on its conditional."""
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_engine import build_engine

    seen: list[tuple[str, int, int]] = []
    engine, conditionals, _ = build_engine(
        graph,
        read_contract(graph / "contract.json"),
        build_of(rtx, workspace=1.0),
        lambda stage, done, total, note="": seen.append((stage, done, total)),
    )
    assert engine.nbytes > 10_000
    assert conditionals.outside == []
    # Queries, keys, values, scores, softmax, weighted sum, output, and two of the map of rank 4.
    assert conditionals.behind == dict.fromkeys(ROUTED, 9)
    assert conditionals.conditions == 2 * len(ROUTED)
    assert conditionals.layers["KV_CACHE_UPDATE"] == 10
    assert [done for _, done, _ in seen] == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engine_in_half_precision(
    rtx: Chosen, make_tokenizer: Callable[..., Any], tmp_path: Path, dtype: str
) -> None:
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_engine import build_engine

    exported(tmp_path, make_tokenizer(), dtype=dtype, compensated=False)
    contract = read_contract(tmp_path / "contract.json")
    engine, conditionals, _ = build_engine(tmp_path, contract, build_of(rtx))
    assert engine.nbytes > 10_000
    assert conditionals.behind == dict.fromkeys(ROUTED, 7)


def test_attention_outside_of_its_conditional_fails(
    rtx: Chosen, graph: Path, tmp_path: Path
) -> None:
    """The usual wrong graph: everything is computed, and a selection picks what is asked for."""
    import shutil
    from dataclasses import replace

    from mskip.compressor.errors import ModelError
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_engine import build_engine

    routed = read_contract(graph / "contract.json")
    eager = replace(
        read_contract(graph / "dense.contract.json"), routed_layers=routed.routed_layers
    )
    for file in graph.iterdir():
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "dense.onnx").rename(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="out of their conditionals"):
        build_engine(tmp_path, eager, build_of(rtx))


def test_graph_of_another_target_is_refused_with_the_builders_words(
    rtx: Chosen, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    from mskip.compressor.errors import ModelError
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_engine import build_engine

    exported(tmp_path, make_tokenizer(), target="ort")
    contract = read_contract(tmp_path / "contract.json")
    with pytest.raises(ModelError, match=r"cannot parse the graph: .*GroupQueryAttention"):
        build_engine(tmp_path, contract, build_of(rtx))


def test_unknown_compute_capability_names_those_there_are(rtx: Chosen) -> None:
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_builders import choose

    with pytest.raises(MskipError, match=r"no compute capability 9\.0") as raised:
        choose(None, ["9.0"])
    assert "8.9" in raised.value.remedy
    assert "12.0" in raised.value.remedy


# Which builder is taken, by what is installed; no test of TensorRT.


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def only(*names: str) -> None:
        for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            members = {"SM89": 89}
            module = SimpleNamespace(
                Builder=object, __version__="1", ComputeCapability=SimpleNamespace()
            )
            module.ComputeCapability.__members__ = members
            # None in the table makes an import fail.
            monkeypatch.setitem(sys.modules, name, module if name in names else None)

    return only


@pytest.mark.parametrize(
    ("there", "wanted", "capabilities", "device", "taken"),
    [
        (["tensorrt", "tensorrt_rtx"], None, [], True, "tensorrt"),
        (["tensorrt", "tensorrt_rtx"], None, ["8.9"], False, "tensorrt-rtx"),
        (["tensorrt", "tensorrt_rtx"], "tensorrt-rtx", [], True, "tensorrt-rtx"),
        (["tensorrt_rtx_bindings"], None, ["8.9"], True, "tensorrt-rtx"),
    ],
)
def test_first_builder_that_can(
    installed: Callable[..., None], there: list[str], wanted: str | None,
    capabilities: list[str], device: bool, taken: str,
) -> None:  # fmt: skip
    from mskip.exporters.trt_builders import choose

    installed(*there)
    assert choose(wanted, capabilities, lambda: device).row.name == taken


@pytest.mark.parametrize(
    ("there", "wanted", "capabilities", "message", "remedy"),
    [
        ([], None, ["8.9"], "not installed: tensorrt and tensorrt-rtx", "mskip[trt-rtx]"),
        ([], "tensorrt", [], "not installed: tensorrt.", "pip install tensorrt"),
        (["tensorrt_rtx"], None, [], "no CUDA device", "--compute-capability 8.9"),
        (["tensorrt"], None, ["8.9"], "its own machine only", "mskip[trt-rtx]"),
        (["tensorrt_rtx"], "openvino", [], "'openvino'", "tensorrt-rtx"),
    ],
)
def test_none_can(
    installed: Callable[..., None], there: list[str], wanted: str | None,
    capabilities: list[str], message: str, remedy: str,
) -> None:  # fmt: skip
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_builders import choose

    installed(*there)
    with pytest.raises(MskipError) as raised:
        choose(wanted, capabilities, lambda: False)
    assert message in raised.value.message
    assert remedy in raised.value.remedy


def test_packages_that_only_say_where_the_real_ones_are_do_not_count(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mskip.exporters.trt_builders import BUILDERS

    installed()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    assert all(row.module() is None for row in BUILDERS)


def test_plugins_need_a_builder_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX would take the functions in the file and compute every row."""
    from mskip.compressor.errors import MskipError
    from mskip.exporters import trt_builders

    with pytest.raises(MskipError, match="tensorrt-rtx has no plugins") as refused:
        trt_builders.choose("tensorrt-rtx", ["8.9"], plugins=True)
    assert "--target trt-plugin" in refused.value.remedy
    monkeypatch.setattr(trt_builders.BuilderRow, "module", lambda row: None)
    with pytest.raises(MskipError, match=r"not installed: tensorrt\.") as refused:
        trt_builders.choose(None, [], plugins=True)
    assert "pip install tensorrt-cu13" in refused.value.remedy


@pytest.mark.parametrize(
    ("text", "batch", "sequence", "context"),
    [
        ("", (1, 1, 8), (1, 512, 2048), 4096),
        ("batch=1,4,8 seq=1,512,2048 context=4096", (1, 4, 8), (1, 512, 2048), 4096),
        ("context=256 batch=2", (2, 2, 2), (1, 256, 256), 256),
    ],
)
def test_profile_is_read(text: str, batch: Any, sequence: Any, context: int) -> None:
    from mskip.exporters.trt_profile import Profile, parse_profile

    assert parse_profile(text) == Profile(batch, sequence, context)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=1,2", "at 'batch=1,2'"),
        ("rows=1", "at 'rows=1'"),
        ("batch=one", "at 'batch=one'"),
        ("batch=1 batch=2", "at 'batch=2'"),
        ("batch=0", "sizes have to rise from at least 1"),
        ("seq=1,9,8", "sizes have to rise"),
        ("context=1,2,3", "one number for context"),
        ("seq=1,8,64 context=32", "prompts of 64 tokens, but a context of 32"),
    ],
)
def test_profile_that_cannot_be(text: str, message: str) -> None:
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_profile import parse_profile

    with pytest.raises(MskipError, match=message):
        parse_profile(text)


def test_command_of_tensorrts_own_tool(graph: Path) -> None:
    """Both profiles, with every input whose shape varies."""
    import shlex

    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_profile import parse_profile, trtexec_script

    contract = read_contract(graph / "contract.json")
    script = trtexec_script(contract, parse_profile(SIZES), "model.onnx", "model.engine")
    lines = [line for line in script.replace("\\\n", " ").splitlines() if "trtexec" in line]
    (command,) = [shlex.split(line) for line in lines]
    assert command[:4] == [
        *("trtexec", "--onnx=model.onnx", "--saveEngine=model.engine", "--stronglyTyped")
    ]
    assert command[4] == "--profile=0"
    assert command[8] == "--profile=1"
    assert command[-1] == "$@"
    shapes = dict(each.split(":") for each in command[7].partition("=")[2].split(","))
    varying = [s.name for s in contract.inputs() if any(isinstance(a, str) for a in s.axes)]
    assert list(shapes) == varying
    assert "tau" not in shapes
    assert shapes["input_ids"] == "4x16"
    assert shapes["past_key_values.0.key"] == f"4x2x{CAPACITY}x8"
    assert "input_ids:4x1," in command[11]


def test_profiles_are_of_prefill_and_decoding(graph: Path) -> None:
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_profile import parse_profile

    contract = read_contract(graph / "contract.json")
    prefill, decoding = parse_profile(SIZES).shapes(contract)
    assert prefill["input_ids"] == [(1, 1), (2, 8), (4, 16)]
    assert decoding["input_ids"] == [(1, 1), (2, 1), (4, 1)]
    assert prefill["past_key_values.0.key"] == [(rows, 2, CAPACITY, 8) for rows in (1, 2, 4)]
    assert prefill["attention_mask"][2] == (4, CAPACITY)
    assert prefill.keys() == decoding.keys()
    assert json.loads(json.dumps(prefill))
