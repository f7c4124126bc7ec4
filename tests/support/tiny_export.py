"""A tiny routed model, exported in any target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from architectures import make
from random_routers import routers_of

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers
    from mskip.compressor.sublayers import Granularity

ROUTED, STATIC, CAPACITY = [1, 2, 3], 2, 32


def exported(
    folder: Path,
    tokenizer: Any,
    name: str = "llama",
    kind: Granularity = "attention",
    *,
    target: str = "trt",
    dtype: str = "float32",
    compensated: bool = True,
) -> tuple[BaseModel, Routers]:
    """Export to ``folder``; gives the model, in its type, and its routers."""
    import torch

    from mskip.compressor.models import BaseModel
    from mskip.exporters.onnx_export import contract_of, export_onnx
    from mskip.exporters.targets import Form

    model = make(name).to(getattr(torch, dtype))
    base = BaseModel(model, tokenizer, None, "")  # type: ignore[arg-type]
    routers = routers_of(ROUTED, kind, compensated)
    tau, form = [0.5] * len(ROUTED), Form(target)  # type: ignore[arg-type]
    export_onnx(
        base, routers, contract_of(base, routers, tau, 20, form, CAPACITY), folder, [STATIC]
    )
    return base, routers
