"""`mskip doctor`: clashes and missing parts are named with the command that mends them."""

from __future__ import annotations

import json

import pytest

from mskip.cli import doctor

TORCH = {"version": "2.13.0", "cuda": None, "gpus": [], "bf16_cpu": False, "bf16_gpu": False}


@pytest.fixture
def machine(monkeypatch):
    """``machine({...})``: pretend that these distributions are installed, and only these."""

    def pretend(extra: dict[str, str], without: tuple[str, ...] = ()) -> None:
        have = {name: version for name, version in doctor.installed().items()
                if not name.startswith(("onnxruntime", "tensorrt"))}  # fmt: skip
        have |= extra
        for name in without:
            have.pop(name)
        monkeypatch.setattr(doctor, "installed", lambda: have)
        answers = {
            doctor._TORCH: TORCH,
            doctor._ONNXRUNTIME: {"version": "1.32.0", "providers": ["CPUExecutionProvider"]},
        }
        monkeypatch.setattr(doctor, "_ask", answers.get)

    return pretend


def test_healthy(mskip, machine):
    machine({"onnxruntime": "1.32.0"})
    result = mskip("doctor")
    assert result.exit_code == 0
    assert "onnxruntime 1.32.0: CPU" in result.stdout
    assert "pip install tensorrt-cu13" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_clash(mskip, machine):
    machine({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    result = mskip("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["ONNX Runtime"]["status"] == "clash"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in checks["ONNX Runtime"]["remedy"]


def test_neither_runtime_is_no_fault(mskip, machine):
    machine({})
    result = mskip("doctor")
    assert result.exit_code == 0
    assert "pip install 'mskip[cpu]'" in result.stdout


def test_missing_core_package(mskip, machine):
    machine({"onnxruntime": "1.32.0"}, without=("accelerate",))
    result = mskip("doctor")
    assert result.exit_code == 1
    assert "pip install accelerate" in result.stdout


def test_broken_native_package_is_a_line():
    assert doctor._ask("raise ImportError('libfoo.so is missing')") == (
        "ImportError: libfoo.so is missing"
    )
    assert doctor._ask("import os; os.abort()") == "ended with status -6"
