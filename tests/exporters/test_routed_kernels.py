"""The kernels on the CPU, in triton's interpreter, against PyTorch in float64; and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

GATES = {
    "all": [1, 1, 1],
    "some": [1, 0, 1],
    "one": [0, 0, 1],
    "none": [0, 0, 0],
}


def randn(*shape: int, seed: int = 0) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Any, limit: float = 2e-5) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= limit * scale


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize(
    ("positions", "inner", "outer"), [(1, 64, 48), (5, 96, 33), (50, 40, 130)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_is_a_product_for_executing_rows(
    gates: list[int], positions: int, inner: int, outer: int, transposed: bool
) -> None:
    import torch

    from mskip.exporters.routed_kernels import linear

    x, weight = randn(3, positions, inner), randn(inner, outer, seed=1)
    execute = torch.tensor(gates, dtype=torch.int32)
    given = weight.T.contiguous() if transposed else weight
    found = linear(x, given, execute, transposed=transposed)
    close(found, (x.double() @ weight.double()) * execute[:, None, None])


def test_linear_does_not_read_rows_that_skip() -> None:
    """Nothing of theirs reaches the result, not even what no arithmetic could clear."""
    import torch

    from mskip.exporters.routed_kernels import linear

    x = randn(3, 2, 32)
    x[1] = float("nan")
    found = linear(x, randn(32, 16), torch.tensor([1, 0, 1], dtype=torch.int32))
    assert not found.isnan().any()
    assert not found[1].any()


def attended(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    """In float64, [batch, new, heads, head dim]."""
    import torch

    group = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(group, dim=1) for each in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return ((scores + mask).softmax(-1) @ value).transpose(1, 2)


def masked(positions: Any, capacity: int, window: int) -> Any:
    import torch

    at, keys = positions[:, None, :, None], torch.arange(capacity)
    seen = keys <= at
    if window:
        seen = seen & (keys > at - window)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


SHAPES = [
    # heads, kv heads, new, head, window, softcap
    (4, 4, 1, 64, 0, 0.0),
    (6, 2, 1, 64, 0, 0.0),
    (9, 3, 7, 64, 0, 0.0),
    (4, 1, 1, 80, 0, 0.0),
    (2, 2, 33, 96, 0, 0.0),
    (8, 2, 1, 128, 0, 0.0),
    (8, 2, 1, 128, 9, 0.0),
    (4, 2, 21, 64, 9, 0.0),
    (4, 2, 5, 256, 0, 30.0),
]


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_buffers(gates: list[int], shape: tuple[Any, ...]) -> None:
    import torch

    from mskip.exporters.routed_kernels import attention

    heads, kv_heads, new, head, window, softcap = shape
    capacity, scale = 75, 0.3 * head**-0.5
    query = randn(3, heads, new, head)
    key, value = (randn(3, kv_heads, capacity, head, seed=seed) for seed in (1, 2))
    first = torch.tensor([0, 11, 40])
    positions = first[:, None] + torch.arange(new)
    for row, last in enumerate(positions[:, -1].tolist()):  # room that nothing was written to
        key[row, :, last + 1 :] = float("nan")
        value[row, :, last + 1 :] = float("nan")
    execute = torch.tensor(gates, dtype=torch.int32)
    mask = masked(positions, capacity, window)
    found = attention(
        query, key, value, mask, execute, positions, scale=scale, softcap=softcap, window=window
    )
    expected = attended(query, key.nan_to_num(), value.nan_to_num(), mask, scale, softcap)
    assert found.shape == (3, new, heads, head)
    close(found, expected * execute[:, None, None, None])


def test_attention_in_half_precision() -> None:
    """Products are of half precision, sums are not."""
    import torch

    from mskip.exporters.routed_kernels import attention

    query = randn(2, 4, 3, 64).half()
    key, value = (randn(2, 2, 40, 64, seed=seed).half() for seed in (1, 2))
    positions = torch.tensor([[20, 21, 22], [37, 38, 39]])
    mask = masked(positions, 40, 0).clamp(min=torch.finfo(torch.float16).min)
    execute = torch.ones(2, dtype=torch.int32)
    found = attention(query, key, value, mask.half(), execute, positions)
    close(found, attended(query, key, value, mask, 64**-0.5, 0.0), 2e-3)


COMPILE = """
import sys
from mskip.exporters.kernel_binaries import compile_attention, compile_linear
capability = sys.argv[1]
every = capability == "8.6"  # it has the least shared memory
for dtype in ("float32", "float16", "bfloat16") if every else ("bfloat16",):
    for prompt in (False, True):
        made = [compile_linear(dtype, capability, prompt=prompt, transposed=prompt)]
        heads = (64, 128, 256) if every else (128,)
        made += [compile_attention(dtype, capability, head, prompt=prompt) for head in heads]
        for each in made:
            target = each.ptx.split(".target ")[1].split()[0]
            arguments = each.ptx.split(".entry")[1].split(")")[0].count(".param")
            print(each.name, each.shared, target, arguments)
"""


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_compiles_without_a_gpu(capability: str, tmp_path: Any) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, capability],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == (24 if capability == "8.6" else 4)
    for name, shared, target, arguments in lines:
        assert int(arguments) == {"linear_kernel": 8, "attention_kernel": 11}[name]
        assert int(shared) <= 99 << 10  # of a program, on the smallest of these GPUs
        assert target.rstrip("af,") == f"sm_{capability.replace('.', '')}"
    assert np.unique([line[0] for line in lines]).tolist() == ["attention_kernel", "linear_kernel"]


def test_interpreting_process_says_why_it_cannot_compile() -> None:
    from mskip.compressor.errors import MskipError
    from mskip.exporters.kernel_binaries import compile_linear

    with pytest.raises(MskipError, match="cannot compile"):
        compile_linear("float16", "8.9", prompt=False, transposed=False)
