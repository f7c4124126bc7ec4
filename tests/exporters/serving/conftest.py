"""Graphs of target "ort" that are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_export import exported


@pytest.fixture(scope="module", params=["attention", "mlp", "block"])
def served_folder(
    request: pytest.FixtureRequest,
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An export of a tiny Llama, whose routers execute about half."""
    folder = tmp_path_factory.mktemp("served")
    exported(folder, make_tokenizer(), "llama", request.param, target="ort")
    return folder
