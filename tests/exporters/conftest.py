"""One tiny run, exported once for all tests: tracing costs seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.exporters.contract import Contract
    from mskip.exporters.ort_runner import OrtRunner
    from mskip.exporters.runner import Runner
    from mskip.exporters.torch_runner import TorchRunner
    from mskip.exporters.tracing import Traced

WORDS = ["user", "assistant", "system", "the", "answer", "is", "question", "one", "two", "Response"]


@dataclass(frozen=True)
class Exported:
    """A tiny run and its export.

    Attributes:
        run: recipe, routers, calibration, samples, tune report, onnx.
        base: the base model; whoever patches it takes the patch out again.
        routers: random, standardised: about half of random prompts execute.
        contract: of the routed graph.
        folder: the export: routed, dense, static and ceiling graphs.
        report: what `export_run` returned.
        traced: the parts from which the graphs were put together.
    """

    run: Run
    base: BaseModel
    routers: Routers
    contract: Contract
    folder: Path
    report: dict[str, Any]
    traced: Traced


@pytest.fixture(scope="session")
def make_exported(tiny_routers: Callable[..., Routers]) -> Callable[..., Exported]:
    """Factory: ``make_exported(folder, model_folder, layers, tau, opset)`` writes and exports."""
    from mskip.compressor.artifact import Run, save_routers
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import Recipe
    from mskip.compressor.samples import run_samples
    from mskip.exporters import onnx_export, tracing
    from mskip.exporters.contract import read_contract

    def make(
        folder: Path, model_folder: Path, layers: list[int], tau: list[float], opset: int
    ) -> Exported:
        rng = random.Random(0)
        turns = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in "ab"] for _ in "x" * 9]
        data = folder / "data.jsonl"
        lines = [json.dumps({"instruction": ask, "output": answer}) for ask, answer in turns]
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "model": {"name": str(model_folder)},
                "routing": {"layers": layers},
                "data": {"source": str(data), "calibration": 3, "held_out": 3},
                "evaluation": {"prompts": 4},
                "export": {"opset": opset},
                # Speed is not judged on a model of this size.
                "validation": {"prompts": 5, "steps": 4, "limits": {"laziness_ratio": 0.0}},
                "bench": {"decode_steps": 2, "threads": 1},
            }
        )
        run = Run(folder / "run")
        base = load_base(recipe.model)
        routers = tiny_routers(base.model, layers=layers)
        run.write_recipe(recipe)
        save_routers(run, routers, base, recipe)
        run.write_calibration({"target": 0.5, "tau": tau})
        # The later a layer, the less it matters: the static peer loses the last ones.
        kl = [1.0 / (1 + layer) for layer in layers]
        run.write_report(
            "tune",
            {
                "sensitivity": {"layers": layers, "kl": kl, "cosine": kl},
                "removal_orders": {"greedy": layers[::-1]},
            },
        )
        run_samples(run, recipe, base)
        parts: list[Traced] = []

        def remembered(*args: Any) -> Traced:
            parts.append(tracing.trace(*args))
            return parts[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_export, "trace", remembered)
            report = onnx_export.export_run(run, base)
        contract = read_contract(run.onnx / onnx_export.CONTRACT)
        return Exported(run, base, routers, contract, run.onnx, report, parts[0])

    return make


@pytest.fixture(scope="session")
def exported(
    make_exported: Callable[..., Exported],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """Four layers, the last three routed, a tau of its own for each. Read only."""
    folder = tmp_path_factory.mktemp("exported")
    return make_exported(folder, tiny_folder, [1, 2, 3], [0.35, 0.5, 0.97], 21)


@pytest.fixture(scope="session")
def exported_tied(
    make_exported: Callable[..., Exported],
    tiny_model: Callable[..., LlamaForCausalLM],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """Three layers, the outer ones routed, the head tied to the embedding. Read only."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exported-tied")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = tiny_model(
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return make_exported(folder, folder / "model", [0, 2], [0.5, 0.5], 18)


@pytest.fixture(scope="module")
def torch_runner(exported: Exported) -> Iterator[TorchRunner]:
    """The reference on the exported run."""
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(exported.base, exported.routers, exported.contract) as runner:
        yield runner


@pytest.fixture(scope="session")
def ort_runner(exported: Exported) -> OrtRunner:
    """The exported routed graph."""
    from mskip.exporters.ort_runner import OrtRunner

    return OrtRunner(exported.folder, threads=1)


@pytest.fixture(params=["torch_runner", "ort_runner"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each in its turn."""
    value: Runner = request.getfixturevalue(request.param)
    return value


@pytest.fixture(scope="session")
def random_prompts(exported: Exported) -> Callable[..., list[list[int]]]:
    """Factory of prompts of given lengths: ``random_prompts(lengths, seed=0)``."""

    def make(lengths: list[int], seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [rng.integers(4, exported.contract.vocabulary, n).tolist() for n in lengths]

    return make


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short laziness runs."""
    from mskip.exporters import laziness

    monkeypatch.setattr(laziness, "CONTEXT", 32)
    monkeypatch.setattr(laziness, "REPEATS", 2)
