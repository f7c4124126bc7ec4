"""`mskip doctor --model`: what it proves, what it prints, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CHECKS = 9

# A Llama with another name, or one whose sequences see each other.
REMOTE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        pathlib.Path(config.marker).touch()
        if config.mixes:
            self.model.layers[1].self_attn.register_forward_hook(
                lambda _, __, out: (out[0] + out[0].mean(dim=0, keepdim=True), *out[1:])
            )
"""


@pytest.fixture
def config_folder(tmp_path: Path):
    """``config_folder("Phi", **entries)``: a folder with a configuration and nothing else."""
    import transformers

    def make(name: str, **entries: Any) -> Path:
        folder = tmp_path / name.lower()
        getattr(transformers, f"{name}Config")(**entries).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``remote(mixes=False)``: a folder with a configuration and Python code."""
    from transformers import dynamic_module_utils

    # The code is copied there and imported from there.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def make(mixes: bool = False) -> Path:
        folder = tmp_path / "odd"
        folder.mkdir()
        (folder / "odd.py").write_text(REMOTE)
        entries = {
            "model_type": "odd",
            "auto_map": {
                "AutoConfig": "odd.OddConfig",
                "AutoModelForCausalLM": "odd.OddForCausalLM",
            },
            "marker": str(tmp_path / "ran"),
            "mixes": mixes,
            "num_hidden_layers": 6,
        }
        (folder / "config.json").write_text(json.dumps(entries))
        return folder

    return make


def test_a_built_in_row_is_proven(mskip, tiny_folder):
    result = mskip("doctor", "--model", tiny_folder)
    assert result.exit_code == 0
    assert "llama: built-in row" in result.stdout
    assert result.stdout.count("passed") == 3 * CHECKS
    assert "family:" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_what_is_printed_for_an_unknown_architecture_is_a_recipe(mskip, config_folder, tmp_path):
    from mskip.compressor.detection import detect
    from mskip.compressor.models import family_from, load_config
    from mskip.compressor.recipe import load_recipe
    from mskip.compressor.tiny import tiny_copy

    folder = config_folder("OPT")
    result = mskip("doctor", "--model", folder)
    assert result.exit_code == 0
    assert result.stdout.count("passed") == 2 * CHECKS
    assert "FAILED" not in result.stdout
    _, block = result.stdout.split("In a recipe:\n")
    (tmp_path / "mine.yaml").write_text("name: mine\n" + block)
    spec = load_recipe(str(tmp_path / "mine.yaml")).model
    assert spec.name == str(folder)
    assert spec.family is not None
    assert family_from(spec.family) == detect(tiny_copy(load_config(spec)))


def test_json(mskip, config_folder):
    result = mskip("doctor", "--model", config_folder("Phi"), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["architecture"], report["built_in"], report["proven"]) == ("phi", False, True)
    assert report["recipe"]["model"]["family"] == report["row"]
    assert report["row"]["mlp_norm"] == "input_layernorm"
    assert len(report["checks"]) == 3 * CHECKS
    assert {check["granularity"] for check in report["checks"]} == {"attention", "mlp", "block"}
    assert all(check["passed"] and check["detail"] for check in report["checks"])


def test_a_row_that_a_switch_forbids(mskip, config_folder):
    """Falcon without the architecture that its row is about: no other row is proposed."""
    result = mskip("doctor", "--model", config_folder("Falcon"))
    assert result.exit_code == 1
    assert "without new_decoder_architecture" in result.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("Bloom", "is not its input plus"), ("T5", "an encoder-decoder")]
)
def test_what_no_row_describes_is_an_error(mskip, config_folder, name, words):
    result = mskip("doctor", "--model", config_folder(name))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in " ".join(result.stderr.split())
    report = json.loads(mskip("doctor", "--model", name.lower(), "--json").stdout)
    assert words in report["error"]


def test_code_is_not_run_unless_it_is_trusted(mskip, remote, tmp_path):
    folder = remote()
    result = mskip("doctor", "--model", folder)
    assert result.exit_code == 1
    assert "trust" in result.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "modules").exists()
    result = mskip("doctor", "--model", folder, "--trust-remote-code")
    assert result.exit_code == 0
    assert (tmp_path / "ran").exists()
    assert "trust_remote_code: true" in result.stdout
    assert "model_type: odd" in result.stdout


def test_a_check_that_fails_ends_with_status_3(mskip, remote):
    folder = remote(mixes=True)
    result = mskip("doctor", "--model", folder, "--trust-remote-code")
    assert result.exit_code == 3
    assert "FAILED" in result.stdout
    assert "a batch is each alone" in result.stdout
    assert "off those alone" in " ".join(result.stdout.split())
    assert "family:" not in result.stdout, "no granularity is proven"
    report = json.loads(mskip("doctor", "--model", folder, "--trust-remote-code", "--json").stdout)
    assert report["proven"] is False
    assert report["recipe"] is None


def test_a_folder_that_is_not_there(mskip):
    result = mskip("doctor", "--model", "./nowhere")
    assert result.exit_code == 1
    assert "nowhere does not exist" in result.stderr


def test_trust_goes_with_a_model(mskip):
    result = mskip("doctor", "--trust-remote-code")
    assert result.exit_code == 2
    assert "--model" in result.stderr
