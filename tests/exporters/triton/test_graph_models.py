"""Repositories whose graph is a model of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import PROMPTS, Served


def as_twin(folder: Path) -> None:
    """Let the python backend hold the graph that is for another backend."""
    from mskip.exporters.contract import read_contract
    from mskip.exporters.triton import config

    model = folder / "models/lm"
    contract = read_contract(folder / "models/generate/1/contract.json")
    text = config.lm_model(contract, "python", 1, 4).text()
    source = model / "source" if (model / "source").is_dir() else model / "1/model.onnx"
    source = source.rename(model / "graph")
    for path in source.iterdir():
        path.rename(model / "1" / path.name)
    shutil.rmtree(model / "configs")
    (model / "config.pbtxt").write_text(text, encoding="utf-8")
    served = Path(config.__file__).parent / "models/lm.py"
    (model / "1/model.py").write_text(served.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_generate_calls_a_graph_that_is_a_model(
    served: Served, make_repository: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    """What calls "lm", tried on the python backend, which holds the same graph here.

    This is no test of the onnxruntime or tensorrt backends: this server has neither.
    """
    from mskip.exporters.triton.server import free_ports, install_server, started

    folder = make_repository(backend=backend)
    as_twin(folder)
    ports = free_ports()
    with started(install_server(), folder / "models", tmp_path / "log.txt", ports) as server:
        there = Served(server, folder, served.runner, served.texts)
        with ThreadPoolExecutor(5) as pool:
            made = list(pool.map(lambda t: there.generate(text_input=t, max_tokens=10), PROMPTS))
        for text, each in zip(PROMPTS, made, strict=True):
            tau = json.loads(each["statistics"])["tau"]
            assert each["output_ids"] == served.expected(text, 10, tau).tokens[0]
