"""The operators of `mskip.exporters.routed_ops` as TensorRT plugins, compiled ahead of time.

TensorRT's Python plugins (``tensorrt.plugin``, from 10.9; its Python API reference) take a kernel's
PTX and its launch, both fixed at the build, and put them into the engine, which then needs neither
Python nor a plugin library. TensorRT chooses between two ways to cut the work by timing them.

Written after the documentation: no machine with TensorRT and a GPU was at hand to run it.
"""
# No `from __future__ import annotations`: TensorRT looks at the annotations themselves.

from collections.abc import Callable
from typing import Any

from mskip.compressor.errors import MskipError
from mskip.exporters.kernel_binaries import Binary, compile_attention, compile_linear
from mskip.exporters.layers import DOMAIN
from mskip.exporters.routed_ops import ATTENTION, LINEAR

STEP, PROMPT = 1, 2
"""Tactics: cut for a decoding step, or for prompts."""
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_NAMES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16"}
_registered: list[str] = []


def register(trt: Any, capability: str) -> None:
    """Make the plugins known to TensorRT, once a process.

    Args:
        trt: the module ``tensorrt``.
        capability: compute capability that kernels are compiled for, such as "9.0".

    Raises:
        MskipError: this TensorRT has no Python plugins, or they are registered for another GPU.
    """
    try:
        import tensorrt.plugin as trtp  # type: ignore[import-not-found]
    except ImportError:
        raise MskipError(
            f"TensorRT {trt.__version__} has no Python plugins.",
            "Use TensorRT 10.9 or later, or --trt-mode if.",
        ) from None
    if _registered:
        if _registered != [capability]:
            raise MskipError(
                f"plugins are registered for compute capability {_registered[0]} already.",
                "Build for each GPU in a process of its own.",
            )
        return
    _register_linear(trtp, capability)
    _register_attention(trtp, capability)
    _registered.append(capability)


def _combinations(trtp: Any, like: Any, pattern: Callable[[str], str]) -> list[Any]:
    """The types that the network has, with both tactics."""
    combination = trtp.AutoTuneCombination(pattern(_NAMES[like.dtype.name]), "LINEAR")
    combination.tactics([STEP, PROMPT])
    return [combination]


def _launch(trtp: Any, binary: Binary, x: Any, y: Any) -> Any:
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = x, y
    launch.block_x = 32 * binary.tile.warps
    launch.shared_mem = binary.shared
    return launch


def _sizes(trtp: Any, values: list[Any]) -> Any:
    return trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in values])


def _register_linear(trtp: Any, capability: str) -> None:
    name = f"{DOMAIN}::{LINEAR}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        x: trtp.TensorDesc, weight: trtp.TensorDesc, execute: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        out = x.like()
        out.shape_expr[2] = weight.shape_expr[1]
        return out

    @trtp.autotune(name)
    def combinations(x, weight, execute, outputs):  # type: ignore[no-untyped-def]
        return _combinations(trtp, x, lambda kind: f"{kind}, {kind}, INT32, {kind}")

    @trtp.aot_impl(name)
    def compiled(x, weight, execute, outputs, tactic):  # type: ignore[no-untyped-def]
        prompt = tactic == PROMPT
        binary = compile_linear(_TYPES[x.dtype.name], capability, prompt=prompt, transposed=False)
        tile = binary.tile
        batch, positions, inner = x.shape_expr
        outer = weight.shape_expr[1]
        launch = _launch(
            trtp, binary, trtp.cdiv(batch * positions, tile.m), trtp.cdiv(outer, tile.n)
        )
        sizes = _sizes(trtp, [batch * positions, positions, inner, outer])
        return binary.name.encode(), binary.ptx.encode(), launch, sizes


def _register_attention(trtp: Any, capability: str) -> None:
    name = f"{DOMAIN}::{ATTENTION}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,
        mask: trtp.TensorDesc,
        execute: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        scale: float,
        softcap: float,
        window: int,
    ) -> trtp.TensorDesc:
        out = query.like()
        out.shape_expr[1], out.shape_expr[2] = query.shape_expr[2], query.shape_expr[1]
        return out

    @trtp.autotune(name)
    def combinations(query, key, value, mask, execute, positions, outputs):  # type: ignore[no-untyped-def]
        types = "{0}, {0}, {0}, {0}, INT32, INT64, {0}"
        return _combinations(trtp, query, types.format)

    @trtp.aot_impl(name)
    def compiled(  # type: ignore[no-untyped-def]
        query, key, value, mask, execute, positions, scale, softcap, window, outputs, tactic
    ):
        prompt = tactic == PROMPT
        batch, heads, new, head = query.shape_expr
        kv_heads, capacity = key.shape_expr[1], key.shape_expr[2]
        width = head.constant_value()
        binary = compile_attention(
            _TYPES[query.dtype.name], capability, width,
            prompt=prompt, scale=float(scale), softcap=float(softcap), window=int(window),
        )  # fmt: skip
        rows = heads // kv_heads * new
        launch = _launch(trtp, binary, trtp.cdiv(rows, binary.tile.m), batch * kv_heads)
        sizes = _sizes(trtp, [heads, kv_heads, new, capacity])
        return binary.name.encode(), binary.ptx.encode(), launch, sizes
