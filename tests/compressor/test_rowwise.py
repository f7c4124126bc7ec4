"""Losses a few rows at a time: values and gradients of the whole, without the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mskip.compressor.rowwise import (
    ROWS,
    hidden_kl,
    hidden_next_token_loss,
    over_rows,
    summarised_kl,
    summary_of,
)

HIDDEN, VOCABULARY = 12, 61


def states(positions: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear]:
    """Student and dense hidden states, and a frozen head."""
    generator = torch.Generator().manual_seed(positions)
    student, dense = torch.randn(2, positions, HIDDEN, generator=generator, dtype=dtype)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype))
    return student.requires_grad_(), dense, head


def softcapped(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A head that is not a matrix product: what is differentiated must be the head itself."""
    return lambda hidden: 3 * torch.tanh(head(hidden) / 3)


def torch_kl(student: Tensor, dense: Tensor, temperature: float) -> Tensor:
    """`F.kl_div` over the whole table."""
    ours, theirs = (F.log_softmax(x / temperature, dim=-1) for x in (student, dense))
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * temperature**2


@pytest.mark.parametrize("positions", [1, ROWS - 1, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_torch_with_its_gradient(
    positions: int, capped: bool, temperature: float
) -> None:
    student, dense, linear = states(positions)
    head = softcapped(linear) if capped else linear
    weights = torch.linspace(-1, 2, positions, dtype=torch.float64)  # every row its own share
    expected = torch_kl(head(student), head(dense), temperature)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    found = hidden_kl(student, dense, head, temperature)
    (found * weights).sum().backward()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=1e-6)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("positions", [1, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_to_a_summary_is_that_of_torch_with_its_gradient(
    positions: int, bias: bool, temperature: float
) -> None:
    student, dense, head = states(positions)
    if bias:
        head.bias = nn.Parameter(torch.linspace(-4, 4, VOCABULARY).double(), requires_grad=False)
    weights = torch.linspace(-1, 2, positions, dtype=torch.float64)
    expected = torch_kl(head(student), head(dense), temperature)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    with torch.no_grad():
        summary = summary_of(dense, head, temperature)
    assert summary.shape == (positions, HIDDEN + 1)
    found = summarised_kl(student, summary, head, temperature)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=1e-11)
    assert gradient.abs().max() > 1e-2


def test_kl_to_a_summary_keeps_its_digits() -> None:
    """Of a small divergence of large logits it loses what these are rounded by, and no more."""
    _, dense, head = states(300, torch.float32)
    head.weight.mul_(8)
    student = dense + 0.003 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    found = summarised_kl(student, summary_of(dense, head), head)
    logits, wanted = (
        head(dense),
        torch_kl(*(head.double()(x.double()) for x in (student, dense)), 1),
    )
    assert logits.abs().max() > 50
    assert wanted.mean() < 0.02
    assert found.dtype == torch.float32
    rounding = float(logits.abs().max()) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4 * rounding)


def test_a_summary_says_nothing_of_a_capped_head() -> None:
    """Why `Family.has_affine_head` is asked: the identity does not hold there."""
    student, dense, linear = states(20)
    head = softcapped(linear)
    off = summarised_kl(student, summary_of(dense, head), head) - hidden_kl(student, dense, head)
    assert off.abs().max() > 1e-2


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_cross_entropy_is_that_of_torch_with_its_gradient(rows: int) -> None:
    student, _, head = states(50)
    targets = torch.arange(50) % VOCABULARY
    expected = F.cross_entropy(head(student), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.mean(), student)
    found = hidden_next_token_loss(student, targets, head, rows)
    found.mean().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_logits_of_all_positions_never_exist(differentiated: bool) -> None:
    student, dense, linear = states(40)
    if not differentiated:
        student = student.detach()
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return linear(hidden)

    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        if saved.data_ptr() != linear.weight.data_ptr():
            kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        loss = hidden_kl(student, dense, head, rows=8).sum()
    assert seen == [8] * 10  # student and dense
    # A table of all logits would be 40 * VOCABULARY; one of 8 rows is dropped with its part.
    assert max(kept, default=0) <= 8 * VOCABULARY
    assert loss.requires_grad is differentiated
    if differentiated:
        assert loss.grad_fn is not None
        node = loss.grad_fn.next_functions[0][0]
        assert [saved.shape for saved in node.saved_tensors] == [(40, HIDDEN)]


def test_equal_states_diverge_by_exactly_nothing() -> None:
    _, dense, head = states(200, torch.float32)
    assert torch.equal(hidden_kl(dense, dense, head), torch.zeros(200))


def test_bfloat16_states_give_float32_losses() -> None:
    student, dense, head = states(9, torch.bfloat16)
    loss = hidden_kl(student, dense, head)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    expected = torch_kl(head(student).float(), head(dense).float(), 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_no_positions() -> None:
    student, dense, head = states(0, torch.float32)
    loss = hidden_kl(student, dense, head)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad is not None


def test_several_values_a_position() -> None:
    _, dense, head = states(20)
    both = over_rows(dense, head, lambda at, _: torch.stack([at.sum(1), at.amax(1)], dim=1), rows=6)
    torch.testing.assert_close(both[:, 1], head(dense).amax(1))
    assert both.shape == (20, 2)
