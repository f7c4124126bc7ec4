"""Decoder layers spread over processes: the same runs, with a part of the weights in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file

from mskip.compressor.artifact import Run
from mskip.compressor.errors import RecipeError
from mskip.compressor.memory import tuning_memory
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.recipe import ModelSpec, Recipe
from mskip.compressor.sharding import require_shardable
from mskip.compressor.tune_step import tune_run

TWO = 2
TUNING = {"bf16": False, "max_steps": 6, "batch_size": 4, "save_steps": 4}
LAYERS = {"layers": [2, 3, 4]}

# What the runs change in a recipe; every path through the tuning step is in one of them.
JOBS: dict[str, dict[str, Any]] = {
    "attention": {
        "routing": {**LAYERS, "granularity": "attention"},
        "compensation": {"rank": 4, "refine": True},
        "tuning": {**TUNING, "gradient_checkpointing": True, "check_targets": [0.75]},
    },
    "block": {
        "model": {"dtype": "bfloat16"},
        "routing": {**LAYERS, "granularity": "block"},
        "tuning": {**TUNING, "gradient_checkpointing": True, "loss": "lm"},
    },
    "interrupted": {
        "routing": {
            "last": 3,
            "choose": "least_harmful",
            "granularity": "mlp",
            "unit": "token",
        },
        "tuning": TUNING,
    },
    "static": {
        "method": "static",
        "routing": LAYERS,
        "compensation": {"rank": 4, "refine": True},
        "tuning": TUNING,
    },
    # Several processes that have all of the model each.
    "whole": {"model": {"shard": False}, "routing": LAYERS, "tuning": TUNING},
}
FAULTY: dict[str, Any] = {"method": "static", "routing": LAYERS, "static": {"removed": [0]}}


class Made(NamedTuple):
    """What the processes left behind."""

    folder: Path
    ranks: dict[str, list[dict[str, Any]]]


def recipe_of(name: str, folder: Path, **changes: dict[str, Any]) -> Recipe:
    """A job's recipe; ``changes`` are merged into its sections."""
    value = {
        "name": name,
        "router": {"init_scale": 0.2, "sensitivity_prompts": 8},
        "data": {
            "source": str(folder / "data.jsonl"),
            "calibration": 8,
            "held_out": 8,
            "answer_tokens": 4,
        },
        **(FAULTY if name == "faulty" else JOBS[name]),
    }
    model = {"name": str(folder / "model"), "shard": True}
    value["model"] = {**model, **value.get("model", {})}
    for section, entries in changes.items():
        value[section] = {**value[section], **entries}
    return Recipe.model_validate(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., BaseModel]) -> Made:
    """Every job in two processes on gloo, as torchrun would start them."""
    folder = tmp_path_factory.mktemp("sharded")
    base = make_base(tie_word_embeddings=True)
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    rows = [{"messages": [{"role": "user", "content": f"the {n} is {n * n}"}]} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = {name: recipe_of(name, folder).model_dump() for name in (*JOBS, "faulty")}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_processes(Path(__file__).with_name("sharded_processes.py"), folder, TWO, 180)
    ranks = {
        name: [json.loads((folder / name / f"rank-{rank}.json").read_text()) for rank in range(TWO)]
        for name in jobs
    }
    return Made(folder, ranks)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_with_half_the_layers_agree_with_one(
    made: Made, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of four samples a step are one of two times four; see ``test_tuning.py``."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        name, made.folder, model={"shard": False}, tuning={"gradient_accumulation": TWO}
    )
    report = tune_run(Run(tmp_path / "run"), recipe, load_base(recipe.model))
    first, second = made.ranks[name]
    ours = first["report"]
    assert ours["removal_orders"] == report["removal_orders"]
    assert ours["sensitivity"]["kl"] == pytest.approx(report["sensitivity"]["kl"], abs=1e-6)
    assert [row["step"] for row in ours["trace"]] == [row["step"] for row in report["trace"]]
    for mine, other in zip(ours["trace"], report["trace"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert len(ours["trace"]) == TUNING["max_steps"]
    folder = made.folder / name / "run-0"
    files = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert files == sorted(path.name for path in folder.glob("*.safetensors"))
    assert ("compensation.safetensors" in files) == ("compensation" in JOBS[name])
    for file in files:
        expected = load_file(tmp_path / "run" / file)
        for key, value in load_file(folder / file).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)
    # One of the processes measures and writes.
    assert second["report"] == {}
    assert not (made.folder / name / "run-1").exists()


@pytest.mark.parametrize("name", [name for name in JOBS if name != "whole"])
def test_a_process_has_its_part_of_the_layers(made: Made, name: str) -> None:
    """And the model says bitwise what the whole one does, called whole and layer by layer."""
    for seen in made.ranks[name]:
        assert seen["local"] == seen["whole"] / TWO
        assert seen["after"] == seen["local"]  # nothing stays together once it has run
        assert seen["same"]


def test_an_interruption_stops_all_processes(made: Made) -> None:
    """Ctrl-C reached the first of them; `made` has it resumed."""
    for seen in made.ranks["interrupted"]:
        assert seen["error"] == "stopped at step 2 of 6; a checkpoint is saved."


def test_a_failure_of_the_first_process_lets_the_others_go(made: Made) -> None:
    first, second = made.ranks["faulty"]
    assert first["error"].startswith("static.removed names layers [0]")
    assert second["error"] == "the first process failed; its own message says why."


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "environment", "message"),
    [
        ({}, {}, r"there is only one\.\nStart it with: accelerate launch"),
        ({}, {"WORLD_SIZE": "1"}, "there is only one"),
        ({"device_map": "auto"}, {"WORLD_SIZE": "2"}, "device_map.*\nSet model.device_map to null"),
        ({"device": "cuda:1"}, {"WORLD_SIZE": "2"}, "on one\\.\nSet model.device to auto"),
        ({}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "\nLeave out --use_fsdp"),
    ],
)
def test_refused(
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RecipeError, match=message):
        require_shardable(ModelSpec(name="x", shard=True, **model))
    require_shardable(ModelSpec(name="x", **model))


def test_refused_before_anything_is_written(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("attention", tmp_path)
    with pytest.raises(RecipeError, match="there is only one"):
        tune_run(Run(tmp_path / "run"), recipe, base)
    assert not list(tmp_path.iterdir())


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_the_estimate_counts_a_share(
    tied: bool, tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 1000, "tie_word_embeddings": tied,
    }  # fmt: skip
    table, layer = 1000 * 64 * 2, 3200
    weights = tables * table + 8 * layer

    def estimate(shard: bool, processes: int | None = None) -> tuple[int, int]:
        model = {"name": "x", "dtype": "bfloat16", "shard": shard}
        recipe = Recipe.model_validate({"name": "x", "model": model, "routing": {"last": 4}})
        memory = tuning_memory(recipe, config, weights, 10, processes)
        return memory.weights, memory.store

    assert estimate(False, 4)[0] == weights
    assert estimate(False, 4)[1] > 0
    # A quarter of the layers, and three whole ones.
    assert estimate(True, 4) == (tables * table + (2 + 3) * layer, 0)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert estimate(True) == (tables * table + (1 + 3) * layer, 0)
    monkeypatch.delenv("WORLD_SIZE")
    assert estimate(True)[0] == weights
