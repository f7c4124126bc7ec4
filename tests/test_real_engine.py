"""The demo's model for TensorRT: its graph in half precision, and the engine built from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mskip.compressor.compensation import Compensation
from mskip.compressor.models import EMBEDDED, BaseModel, load_base
from mskip.compressor.preparing import routed_sublayers
from mskip.compressor.recipe import ModelSpec, load_recipe
from mskip.compressor.router import Routers
from mskip.exporters.onnx_export import contract_of, export_onnx
from mskip.exporters.targets import Form

CONTEXT = 512
TEXTS = [
    *("Why is the sky blue?", "Name three metals.", "Write a line about the sea."),
    *("Translate 'good morning' into French.", "What is 7 times 8?", "Who wrote Hamlet?"),
]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(ModelSpec(name=EMBEDDED))


@pytest.fixture(scope="module")
def routers(base: BaseModel) -> Routers:
    """Of the demo's recipe, random: an engine does not depend on their values."""
    sublayers = routed_sublayers(load_recipe("smollm2-135m"), base)
    torch.manual_seed(0)
    made = Routers(sublayers, base.model.config.hidden_size)
    torch.nn.init.normal_(made.weight, std=0.1)
    assert isinstance(sublayers.compensation, Compensation)
    for each in sublayers.compensation.parameters():
        torch.nn.init.normal_(each, std=0.01)
    return made


@pytest.fixture(scope="module")
def folder(base: BaseModel, routers: Routers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    half = replace(base, model=copy.deepcopy(base.model).half())
    place = tmp_path_factory.mktemp("engine")
    tau = [0.5] * len(routers.layers)
    contract = contract_of(half, routers, tau, 20, Form("trt"), CONTEXT)
    export_onnx(half, routers, contract, place, routers.layers[:8])
    return place


def test_graph_is_pytorch_in_float32_within_half_precision(
    folder: Path, base: BaseModel, routers: Routers
) -> None:
    """By the limits of ``validation.float16``: the very file that the engine is built from."""
    from mskip.compressor.recipe import ValidationSpec
    from mskip.exporters.opening import open_runner
    from mskip.exporters.parity import compare
    from mskip.exporters.torch_runner import TorchRunner

    prompts = list(_prompts(base))
    engine = open_runner(folder)
    assert engine.contract.dtype == "float16"
    with TorchRunner(base, routers, engine.contract) as reference:
        found = compare(reference, engine, prompts, 6)
    limits = ValidationSpec().float16
    assert found.calls == len(prompts) * len(routers.layers)
    assert found.agreement >= limits.decision_agreement
    assert found.kl / found.positions <= limits.kl
    assert found.next_matching / found.positions >= limits.next_token_match


def _prompts(base: BaseModel) -> Iterator[list[int]]:
    for text in TEXTS:
        chat = [{"role": "user", "content": text}]
        words = base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        yield base.tokenizer(words, add_special_tokens=False)["input_ids"]


def test_engine_for_two_kinds_of_gpu(folder: Path) -> None:
    """Built by the real TensorRT-RTX; each skippable product hangs on its conditional."""
    from mskip.exporters.contract import read_contract
    from mskip.exporters.trt_builders import BUILDERS, choose
    from mskip.exporters.trt_engine import Build, build_engine
    from mskip.exporters.trt_profile import parse_profile

    (row,) = [row for row in BUILDERS if row.crosses]
    if row.module() is None:
        pytest.skip(f"not installed: {row.install}")
    capabilities = ["8.9", "12.0"]
    profile = parse_profile(f"batch=1,1,4 seq=1,128,512 context={CONTEXT}")
    contract = read_contract(folder / "contract.json")
    build = Build(choose(row.name, capabilities), profile, capabilities)
    engine, conditionals, _ = build_engine(folder, contract, build)
    # Half of 135 million weights' bytes in float32, for each kind of GPU alike.
    assert engine.nbytes > 2 * 135e6
    assert conditionals.outside == []
    # Queries, keys, values, scores, softmax, weighted sum, output, and two of the map.
    assert conditionals.behind == dict.fromkeys(contract.routed_layers, 9)
    assert conditionals.conditions == 2 * len(contract.routed_layers)
