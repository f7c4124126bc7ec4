"""Graphs of target "ort" that are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import make
from random_routers import routers_of

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module", params=["attention", "mlp", "block"])
def served_folder(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An export of a tiny Llama, whose routers execute about half."""
    from mskip.compressor.models import BaseModel
    from mskip.exporters.onnx_export import contract_of, export_onnx
    from mskip.exporters.targets import Form

    base = BaseModel(make("llama"), make_tokenizer(), None, "")  # type: ignore[arg-type]
    routers = routers_of(LAYERS, request.param, compensated=True)
    folder = tmp_path_factory.mktemp("served")
    contract = contract_of(base, routers, [0.5] * 3, 20, Form("ort"))
    export_onnx(base, routers, contract, folder, [2])
    return folder
