"""What is installed: the wheel's contents, what an import costs, and who may import whom."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["compressor", "exporters", "cli", "recipes"]
DATA = [
    *("recipes/**/*.yaml", "recipes/*.jsonl", "exporters/*.html", "py.typed", "LICENSE"),
    "exporters/triton/assets/*",
]


def python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, started elsewhere than in the tree.

    Without the working directory in its path: a checkout may lie there under the name mskip.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=ROOT.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in [*PACKAGES, "tests", "benchmarks", "docs"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", folder, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [each for each in wheel.namelist() if each.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode("utf-8")


def test_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {"mskip/__init__.py"}
    for package in PACKAGES:
        expected |= {f"mskip/{p.relative_to(ROOT)}" for p in (ROOT / package).rglob("*.py")}
    data = {f"mskip/{p.relative_to(ROOT)}" for pattern in DATA for p in ROOT.glob(pattern)}
    for wanted in ("recipes/prompts.jsonl", "recipes/smollm2-135m.yaml", "exporters/report.html"):
        assert f"mskip/{wanted}" in data
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected | data


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    import mskip

    metadata = email.message_from_string(info(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("mskip", mskip.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "Apache License" in info(wheel, "licenses/LICENSE")
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"cpu", "gpu", "triton", "eval", "demo", "dev"} <= extras
    # onnxruntime only through an extra: the CPU and the GPU wheel own the same module.
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert not [line for line in needed if line.startswith("onnxruntime")]


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(info(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"mskip": "mskip.cli.main:main"}


def test_wheel_works_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = """
import mskip
from mskip.cli.main import main
from mskip.compressor.data import read_conversations
from mskip.compressor.recipe import load_recipe, shipped_recipes
recipes = [load_recipe(name).name for name in shipped_recipes()]
print(mskip.__file__, callable(main), len(recipes), len(read_conversations("embedded:prompts")))
"""
    where, command, recipes, prompts = python(code, PYTHONPATH=str(tmp_path)).split()
    assert Path(where).is_relative_to(tmp_path)
    assert command == "True"
    assert int(recipes) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert int(prompts) >= 100


# -- imports ----------------------------------------------------------------------------------


def loaded(module: str, *suspects: str) -> list[str]:
    """Which of ``suspects`` an import of ``module`` brings along."""
    code = f"import sys, {module}; print(*[m for m in {suspects!r} if m in sys.modules])"
    return python(code).split()


def test_compressor_brings_no_engine() -> None:
    modules = [f"mskip.compressor.{path.stem}" for path in (ROOT / "compressor").glob("[!_]*.py")]
    engines = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt")
    assert loaded(", ".join(modules), "torch", *engines) == ["torch"]


def test_the_command_line_starts_light() -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "matplotlib")
    assert loaded("mskip.cli.main", "typer", *heavy) == ["typer"]


def test_without_onnxruntime_the_exporters_import() -> None:
    """It comes with an extra, and is asked for where it is needed."""
    names = [f"mskip.exporters.{path.stem}" for path in (ROOT / "exporters").glob("[!_]*.py")]
    python(f"import sys; sys.modules['onnxruntime'] = None; import {', '.join(names)}")


def test_import_direction() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


# -- the tree ---------------------------------------------------------------------------------


def test_no_tracked_file_knows_this_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    # In parts, or this file would be the first to be found.
    places = ["/" + "work/", "/" + "tmp/proto", "/" + "root/"]
    # Not "/" or "/src", which mean nothing.
    places += [f"{path}/" for path in (Path.home(), ROOT) if len(path.parts) > 2]
    pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(place)}" for place in places).encode())
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in paths
        if path.is_file()
        for match in pattern.finditer(path.read_bytes())
    ]
    assert found == []
