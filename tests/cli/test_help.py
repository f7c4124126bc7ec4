"""Help: at once, for every command, with an example; usage errors exit 2."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = (
    *("tune", "calibrate", "export", "validate", "bench", "eval", "report", "run"),
    *("serve", "lint"),
    *("inspect", "generate", "doctor", "recipe", "recipe schema", "recipe list", "recipe show"),
)


def test_help_answers_at_once():
    def spent() -> float:
        started = time.monotonic()
        program = "from mskip.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "calibrate" in done.stdout
        return time.monotonic() - started

    # 0.15 s on two quiet cores; the limit is for a busy machine.
    assert min(spent() for _ in range(3)) < 1.0


def test_help_imports_nothing_heavy():
    program = (
        "import sys, mskip.cli.main; "
        "print([m for m in ('torch', 'transformers', 'onnx', 'numpy', 'pydantic', 'yaml') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(mskip, command):
    result = mskip(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: mskip {command}" in result.stdout.replace("\n", " ")
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_version(mskip):
    assert mskip("--version").stdout.startswith("mskip 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["tune", "--no-such-option"],
        ["generate"],
        ["calibrate", "--capacity", "half"],
        ["bench", "--batch", "1,x"],
        ["bench", "--context", "0"],
        ["bench", "--repeats", "0"],
        ["generate", "hello", "--engine", "abacus"],
    ],
)
def test_usage_errors_exit_2(mskip, arguments):
    result = mskip(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
    assert not list(Path().iterdir())
