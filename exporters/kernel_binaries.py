"""The kernels compiled ahead of time: PTX for a GPU that need not be here.

What TensorRT's ahead-of-time plugins and other hosts load. Compiled in a process of its own kind:
where triton interprets (``TRITON_INTERPRET=1``), nothing can be compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mskip.compressor.errors import MissingExtraError, MskipError
from mskip.exporters.tiles import Tile, chosen

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""Compute capabilities that the tests compile for."""
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        name: of its entry.
        ptx: the code.
        shared: bytes of shared memory of a program.
        tile: how it is cut, which its launch has to know.
    """

    name: str
    ptx: str
    shared: int
    tile: Tile


def compile_linear(dtype: str, capability: str, *, prompt: bool, transposed: bool) -> Binary:
    """`linear_kernel` for a type and a GPU.

    Args:
        dtype: of states and weights: "float32", "float16" or "bfloat16".
        capability: such as "8.9".
        prompt: for many rows rather than a decoding step's.
        transposed: see `mskip.exporters.routed_kernels.linear`.

    Raises:
        MissingExtraError: triton is not installed.
        MskipError: triton interprets, or cannot compile for that GPU.
    """
    kernels = _kernels()
    tile = chosen("linear", capability, dtype, prompt=prompt)
    states = _POINTERS[dtype]
    types = [states, states, "*i32", "i32", "i32", "i32", "i32", states]
    constants = {"TRANSPOSED": transposed, **tile.constants()}
    return _compiled(kernels.linear_kernel, types, constants, tile, capability)


def compile_attention(
    dtype: str,
    capability: str,
    head: int,
    *,
    prompt: bool,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Binary:
    """`attention_kernel` for a type, a GPU and a width of heads.

    Args:
        dtype: see `compile_linear`.
        capability: see `compile_linear`.
        head: elements of a head.
        prompt: see `compile_linear`.
        scale: see `mskip.exporters.routed_kernels.attention`.
        softcap: see there.
        window: see there.

    Raises:
        MissingExtraError: triton is not installed.
        MskipError: triton interprets, or cannot compile for that GPU.
    """
    kernels = _kernels()
    tile = chosen("attention", capability, dtype, prompt=prompt, head=head)
    states = _POINTERS[dtype]
    types = [states] * 4 + ["*i32", "*i64"] + ["i32"] * 4 + [states]
    constants = {**kernels.attention_constants(head, scale, softcap, window), **tile.constants()}
    return _compiled(kernels.attention_kernel, types, constants, tile, capability)


def _kernels() -> Any:
    try:
        from mskip.exporters import routed_kernels
    except ImportError:
        raise MissingExtraError("triton", "kernels") from None
    if routed_kernels.INTERPRETED:
        raise MskipError(
            "triton interprets its kernels in this process and cannot compile them.",
            "Start again without TRITON_INTERPRET.",
        )
    return routed_kernels


def _compiled(
    kernel: Any, types: list[str], constants: dict[str, Any], tile: Tile, capability: str
) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature.update(dict.fromkeys(constants, "constexpr"))
    # Pointers are aligned: buffers of every runtime are, and loads are then whole words.
    pointers = [number for number, each in enumerate(types) if each.startswith("*")]
    attributes = {(number,): [["tt.divisibility", 16]] for number in pointers}
    source = ASTSource(kernel, signature, constants, attributes)
    major, minor = capability.split(".")
    target = GPUTarget("cuda", 10 * int(major) + int(minor), 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    try:
        found = triton.compile(source, target=target, options=options)
    except Exception as error:
        raise MskipError(
            f"triton {triton.__version__} cannot compile {kernel.__name__} for compute capability "
            f"{capability}: {str(error).strip().splitlines()[0]}"
        ) from error
    ptx = without_scratch(found.asm["ptx"], len(types))
    return Binary(found.metadata.name, ptx, found.metadata.shared, tile)


def without_scratch(ptx: str, arguments: int) -> str:
    """A kernel's PTX with the arguments that its caller knows of.

    Triton adds pointers to scratch memory at the end, which these kernels do not read, and a host
    that passes only what it was told would read past its own list.

    Args:
        ptx: of one kernel.
        arguments: that the kernel was written with.

    Raises:
        MskipError: a further argument is read.
    """
    head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert head is not None
    parameters = [each.strip() for each in head[1].split(",")]
    for extra in parameters[arguments:]:
        if ptx.count(extra.split()[-1]) > 1:
            raise MskipError(
                f"the compiled kernel reads {extra.split()[-1]}, which no host passes."
            )
    kept = ",\n\t".join(parameters[:arguments])
    return ptx[: head.start(1)] + f"\n\t{kept}\n" + ptx[head.end(1) :]
