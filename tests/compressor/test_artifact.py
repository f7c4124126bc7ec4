"""The run folder: what is written is read back bitwise, and what does not belong is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mskip.compressor import artifact
from mskip.compressor.artifact import (
    Run,
    load_routers,
    open_run,
    routers_hash,
    save_routers,
    tuned_by,
)
from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ArtifactError, RecipeError
from mskip.compressor.models import BaseModel
from mskip.compressor.recipe import ModelSpec, Recipe
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(name="tiny", model=ModelSpec(name="some/model", revision="main"))


@pytest.fixture
def run(
    tmp_path: Path, base: BaseModel, recipe: Recipe, tiny_routers: Callable[..., Routers]
) -> Run:
    """A run with routers."""
    run = Run(tmp_path / "run")
    routers = tiny_routers(base.model, (1, 3, 4))
    routers.bias.normal_(generator=torch.Generator().manual_seed(0))
    save_routers(run, routers, base, recipe)
    return run


def test_fault_9_router_weights_without_a_loader(
    run: Run, base: BaseModel, recipe: Recipe, tmp_path: Path
) -> None:
    """Router-only weights come back bitwise, frozen, and route as they did."""
    loaded = load_routers(run, base)
    assert loaded.layers == [1, 3, 4]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = Run(tmp_path / "again")
    save_routers(again, loaded, base, recipe)
    names = ("router.safetensors", "router_config.json")
    assert sorted(path.name for path in again.path.iterdir()) == sorted(names)
    for name in names:
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    twice = load_routers(again, base)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name])
        assert bool(value.any())
    ids = torch.randint(4, 90, (6, 5), generator=torch.Generator().manual_seed(0))
    logits = []
    for routers in (loaded, twice):
        with MindSkip(base.model, routers), torch.no_grad():
            logits.append(base.model(ids).logits)
    assert torch.equal(*logits)


def test_configuration_names_the_base_model(run: Run, base: BaseModel) -> None:
    config = json.loads((run.path / "router_config.json").read_text())
    assert config["base_model"] == {
        "name": "some/model",
        "revision": "main",
        "sha256": base.sha256,
    }
    assert config["layers"] == [1, 3, 4]
    assert config["hidden_size"] == 32
    assert config["granularity"] == "attention"


def test_wrong_base_model(run: Run, base: BaseModel) -> None:
    other = replace(base, sha256="f" * 64, folder=Path("/models/other"))
    with pytest.raises(ArtifactError, match=r"some/model with hash 0{12}.*/models/other.*f{12}"):
        load_routers(run, other)


@pytest.mark.parametrize("damage", ["cut", "empty", "no safetensors", "other shape", "other names"])
def test_damaged_weights(run: Run, base: BaseModel, damage: str) -> None:
    path = run.path / "router.safetensors"
    whole = path.read_bytes()
    if damage == "other shape":
        safetensors.torch.save_file({"weight": torch.zeros(2, 32)}, path)
    elif damage == "other names":
        safetensors.torch.save_file({"linear": torch.zeros(3, 32)}, path)
    else:
        path.write_bytes({"cut": whole[:-50], "empty": b"", "no safetensors": b"x" * 500}[damage])
    with pytest.raises(ArtifactError, match=r"router\.safetensors is damaged") as caught:
        load_routers(run, base)
    assert caught.value.remedy == "Tune again."


def test_tampered_weights(run: Run, base: BaseModel) -> None:
    """A valid file of the right shapes that is not the one that was saved."""
    path = run.path / "router.safetensors"
    state = safetensors.torch.load_file(path)
    state["bias"][0] += 1e-6
    safetensors.torch.save_file(state, path)
    with pytest.raises(ArtifactError, match=r"not the file that router_config\.json describes"):
        load_routers(run, base)


@pytest.mark.parametrize(
    "entry", ["layers", "hidden_size", "base_model", "base_model.sha256", "sha256.router"]
)
def test_missing_entries(run: Run, base: BaseModel, entry: str) -> None:
    path = run.path / "router_config.json"
    config = json.loads(path.read_text())
    *above, last = entry.split(".")
    owner = config[above[0]] if above else config
    del owner[last]
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"lacks or mangles the entry '{last}'"):
        load_routers(run, base)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"format": 2, "layers": 1}', '{"format": 2, "layers": null}']
)
def test_mangled_configuration(run: Run, base: BaseModel, text: str) -> None:
    (run.path / "router_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="lacks or mangles"):
        load_routers(run, base)


@pytest.mark.parametrize("name", ["router.safetensors", "router_config.json"])
def test_missing_files(run: Run, base: BaseModel, name: str) -> None:
    (run.path / name).unlink()
    with pytest.raises(ArtifactError, match=r"^no (router|weights)") as caught:
        load_routers(run, base)
    assert "mskip tune" in caught.value.remedy


def test_interrupted_write_keeps_the_old_routers(
    run: Run, base: BaseModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}

    def cut(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        save_routers(run, Routers([1, 3, 4], 32), base, recipe)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    load_routers(run, base)


# -- which run --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_run_is_opened(elsewhere: Path, recipe: Recipe) -> None:
    with pytest.raises(ArtifactError, match="no run in runs/ yet") as caught:
        open_run(None)
    assert "mskip tune" in caught.value.remedy
    for name in ("one", "two"):
        run = Run(Path("runs") / name)
        run.write_recipe(recipe)
        run.remember()
    assert open_run(None).path == elsewhere / "runs" / "two"
    assert open_run(Path("runs/one")).path == Path("runs/one")
    Run(Path("runs/one")).remember()
    assert open_run(None).path == elsewhere / "runs" / "one"
    assert open_run(None).recipe() == recipe


@pytest.mark.usefixtures("elsewhere")
def test_the_last_run_is_gone(recipe: Recipe) -> None:
    run = Run(Path("runs/one"))
    run.write_recipe(recipe)
    run.remember()
    os.rename("runs/one", "runs/moved")
    with pytest.raises(ArtifactError, match=r"no run at .*one"):
        open_run(None)


def test_a_folder_that_is_no_run(elsewhere: Path) -> None:
    with pytest.raises(ArtifactError, match="no run at"):
        open_run(elsewhere / "nothing")
    with pytest.raises(ArtifactError, match=r"is not a run: it has no recipe\.yaml"):
        open_run(elsewhere)
    (elsewhere / "recipe.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match="YAML error"):
        open_run(elsewhere)


# -- the other files --------------------------------------------------------------------------


def test_manifest_gathers_entries(run: Run) -> None:
    run.write_manifest(seeds={"tuning": 3})
    run.write_manifest(base_model={"name": "a"})
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["seeds"] == {"tuning": 3}
    assert manifest["base_model"] == {"name": "a"}
    assert manifest["versions"] == artifact.versions()
    assert set(manifest["versions"]) == {"mskip", "python", "torch", "transformers"}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tau": 0.5}'])
def test_damaged_calibration(run: Run, text: str) -> None:
    with pytest.raises(ArtifactError, match="no calibration") as caught:
        run.calibration()
    assert "mskip calibrate" in caught.value.remedy
    (run.path / "calibration.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        run.calibration()


def test_calibration_and_reports_come_back(run: Run) -> None:
    run.write_calibration({"tau": [0.5, 0.25]})
    assert run.calibration() == {"tau": [0.5, 0.25]}
    run.write_report("eval", {"rows": []})
    assert run.report("eval", "") == {"rows": []}
    with pytest.raises(ArtifactError, match="no bench report") as caught:
        run.report("bench", "Make it with: mskip bench")
    assert caught.value.remedy == "Make it with: mskip bench"


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("granularity", ["attention", "mlp", "block"])
def test_granularity_and_compensation_come_back(
    run: Run, base: BaseModel, recipe: Recipe, granularity: Granularity, rank: int
) -> None:
    compensation = Compensation(2, 32, rank)
    for parameter in compensation.parameters():
        torch.nn.init.normal_(parameter)
    routers = Routers(Sublayers([2, 3], granularity, compensation), 32)
    save_routers(run, routers, base, recipe, "static")
    loaded = load_routers(run, base)
    assert loaded.sublayers.granularity == granularity
    assert tuned_by(run) == "static"
    again = loaded.sublayers.compensation
    assert again is not None
    assert again.rank == rank
    hidden = torch.randn(3, 32)
    assert again(1, hidden).equal(compensation(1, hidden))
    hash_before = routers_hash(run)
    torch.nn.init.normal_(compensation.bias)
    save_routers(run, routers, base, recipe, "static")
    assert routers_hash(run) != hash_before
    (run.path / "compensation.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_routers(run, base)
    save_routers(run, Routers([2, 3], 32), base, recipe)
    assert not (run.path / "compensation.safetensors").exists()
