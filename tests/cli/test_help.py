"""Help: at once, for every command, with an example; usage errors exit 2."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    *("tune", "calibrate", "export", "validate", "bench", "eval", "report", "run"),
    *("serve", "lint", "static"),
    *("inspect", "generate", "doctor", "recipe", "recipe schema", "recipe list", "recipe show"),
)


BARE = """
import typer

app = typer.Typer()


@app.command()
def one(number: int = 1) -> None:
    "One."


app()
"""


def test_help_answers_at_once():
    """Beside a bare Typer program: 0.15 s on two quiet cores, most of it Typer's own."""

    def spent(program: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert "--help" in done.stdout
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    ours = "from mskip.cli.main import main; main()"
    # Processor time, in turns: what else the machine does slows both. Measured 1.1 to 1.9 a
    # pair; importing transformers or torch would make it 5 and more.
    assert statistics.median(spent(ours) / spent(BARE) for _ in range(5)) < 2.5


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
