"""Decoding with the kernels, interpreted on the CPU, against transformers' own arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from architectures import make
from random_routers import routers_of

if TYPE_CHECKING:
    from mskip.exporters.torch_runner import TorchRunner

pytest.importorskip("triton")

ROUTED = [1, 2, 3]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4]]
MIXED = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
CASES = [
    ("llama", "attention"),
    ("llama", "mlp"),
    ("llama", "block"),
    ("gemma2, sliding", "attention"),
    ("qwen2", "attention"),  # with biases
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def parts(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Any:
    from mskip.compressor.models import BaseModel
    from mskip.exporters.onnx_export import contract_of

    name, kind = request.param
    base = BaseModel(make(name), make_tokenizer(), None, "")  # type: ignore[arg-type]
    routers = routers_of(ROUTED, kind, True)
    return base, routers, contract_of(base, routers, [0.5] * len(ROUTED), 20)


@pytest.fixture
def steps(parts: Any) -> Iterator[TorchRunner]:
    from mskip.exporters.torch_runner import TorchRunner

    with TorchRunner(*parts, kernels="triton") as runner:
        yield runner


def compared(parts: Any, what: Callable[[TorchRunner], Any]) -> tuple[Any, Any]:
    """What the kernels give, and what transformers' arithmetic gives."""
    from mskip.exporters.torch_runner import TorchRunner

    results = []
    for kernels in ("triton", None):
        with TorchRunner(*parts, kernels=kernels) as runner:  # type: ignore[arg-type]
            results.append(what(runner))
    return results[0], results[1]


@pytest.mark.parametrize(
    "forced", [None, MIXED, np.zeros_like(MIXED), np.ones_like(MIXED)],
    ids=["scores", "mixed", "skip", "execute"],
)  # fmt: skip
def test_steps_after_prompts_of_unequal_lengths(parts: Any, forced: Any) -> None:
    from mskip.exporters.runner import left_padded

    ids, mask = left_padded(PROMPTS, 0)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, 90, (len(ids), new)) for new in (1, 1, 2)]

    def what(runner: TorchRunner) -> list[Any]:
        state = runner.prefill(ids, mask, routing=forced)
        found = []
        for each in tokens:
            state = runner.extend(state, each)
            found.append(state.logits)
        return [*found, state.routing]

    for found, expected in zip(*compared(parts, what), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_generation_with_sequences_that_end(parts: Any) -> None:
    """Those that have ended are fed padding, which their buffers do not count."""
    found, expected = compared(parts, lambda runner: runner.generate(PROMPTS, 6))
    assert found.tokens == expected.tokens
    assert found.ended == expected.ended


def test_kernels_do_all_that_a_skip_saves(
    parts: Any, steps: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mskip.compressor.families import family_of
    from mskip.exporters import routed_kernels

    base, routers, contract = parts
    calls = {"linear": 0, "attention": 0}
    for name in calls:

        def counted(
            *args: Any, name: str = name, usual: Any = getattr(routed_kernels, name), **kwargs: Any
        ) -> Any:
            calls[name] += 1
            return usual(*args, **kwargs)

        monkeypatch.setattr(routed_kernels, name, counted)
    state = steps.prefill(np.array([PROMPTS[1]]))
    assert not any(calls.values())
    steps.extend(state, np.array([[5]]))
    kind, family = routers.sublayers.granularity, family_of(base.model)
    products = [
        part
        for layer in ROUTED
        for part in family.sublayer_of(base.model, layer, kind).modules()
        if isinstance(part, torch.nn.Linear)
    ]
    assert calls == {"linear": len(products), "attention": contract.layers}


def test_selected_rows_go_on(parts: Any) -> None:
    from mskip.exporters.runner import left_padded

    ids, mask = left_padded(PROMPTS, 0)

    def what(runner: TorchRunner) -> Any:
        state = runner.prefill(ids, mask, routing=MIXED)
        state = runner.extend(state, ids[:, -1:])
        state = runner.select(state, [2, 0, 0])
        return runner.extend(state, np.array([[7], [8], [9]])).logits

    found, expected = compared(parts, what)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_going_on_from_an_earlier_state_refuses_later_ones(steps: TorchRunner) -> None:
    ids = np.array([PROMPTS[1]])
    first = steps.extend(steps.prefill(ids), np.array([[5]]))
    later = steps.extend(first, np.array([[6]]))
    again = steps.extend(first, np.array([[6]]))
    np.testing.assert_array_equal(again.logits, later.logits)
    with pytest.raises(ValueError, match="overwritten"):
        steps.extend(later, np.array([[7]]))


def test_buffers_grow(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mskip.exporters import kernel_steps

    monkeypatch.setattr(kernel_steps, "ROOM", 1)
    found, expected = compared(parts, lambda runner: runner.generate(PROMPTS[:1], 6).tokens)
    assert found == expected


def test_without_gpu_and_interpreter_it_says_so(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mskip.compressor.errors import ModelError
    from mskip.exporters import routed_kernels
    from mskip.exporters.torch_runner import TorchRunner

    monkeypatch.setattr(routed_kernels, "INTERPRETED", False)
    with pytest.raises(ModelError, match="run on an NVIDIA GPU"):
        TorchRunner(*parts, kernels="triton")
