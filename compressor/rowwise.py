"""Losses at many positions from final hidden states, a few rows of logits at a time.

The logits of all positions, [positions, vocabulary], never exist: the head, the
loss and the gradient are computed for `ROWS` positions and dropped. What stays
for the backward pass is one gradient of the hidden states' own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mskip.compressor.objective import kl_to_dense, next_token_loss

ROWS = 128  # Fewer start more kernels, more leave the caches; the gain is flat around it.

Head = Callable[[Tensor], Tensor]
"""[rows, hidden] -> [rows, vocabulary], row by row; `SplitModel.logits`."""

Measure = Callable[[Tensor, slice], Tensor]
"""Values of the positions in the slice from their logits: [rows] or [rows, k]."""


def over_rows(hidden: Tensor, head: Head, measure: Measure, rows: int = ROWS) -> Tensor:
    """Apply ``measure`` to the logits of every position.

    Args:
        hidden: final hidden states, [positions, hidden].
        head: frozen; gradients reach ``hidden`` and nothing else.
        measure: of one position's logits each; differentiated where it gives [rows].
        rows: positions whose logits exist at one time.

    Returns:
        [positions], or [positions, k] without a gradient.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        result: Tensor = _OverRows.apply(  # type: ignore[no-untyped-call]
            hidden, head, measure, rows
        )
        return result
    with torch.no_grad():
        return torch.cat([measure(head(hidden[part]), part) for part in _parts(hidden, rows)])


def hidden_kl(
    student: Tensor, dense: Tensor, head: Head, temperature: float = 1.0, rows: int = ROWS
) -> Tensor:
    """KL(dense || student) of every position from final hidden states, in nats.

    Args:
        student: [positions, hidden]; the gradient goes here.
        dense: of the dense model, same shape.
        head: see `over_rows`.
        temperature: see `kl_to_dense`.
        rows: see `over_rows`.

    Returns:
        [positions], float32 (float64 for float64 logits).
    """

    def measure(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            teacher = head(dense[part])
        return kl_to_dense(logits, teacher, temperature)

    return over_rows(student, head, measure, rows)


def summary_of(dense: Tensor, head: Head, temperature: float = 1.0, rows: int = ROWS) -> Tensor:
    """All that `summarised_kl` needs of the dense model, whatever the student.

    With logits z = W h + b, KL(dense || student) is the Bregman divergence of f(h) = logsumexp(z):
    f(student) - f(dense) - (student - dense) . f'(dense), with f' = W^T softmax(z). The vector f'
    and a number a position replace the dense model's product with the whole vocabulary.

    Args:
        dense: final hidden states, [positions, hidden], float32 or float64.
        head: affine, see `Family.has_affine_head`.
        temperature: see `kl_to_dense`.
        rows: see `over_rows`.

    Returns:
        [positions, hidden + 1]: f' and dense . f' - f.
    """
    with torch.enable_grad():
        at = dense.detach().requires_grad_()
        value = over_rows(at, head, _normaliser(temperature), rows)
        (slope,) = torch.autograd.grad(value.sum(), at)
    offset = torch.linalg.vecdot(dense.double(), slope.double()) - value.detach()
    return torch.cat([slope, offset[:, None].to(slope.dtype)], dim=1)


def summarised_kl(
    student: Tensor, summary: Tensor, head: Head, temperature: float = 1.0, rows: int = ROWS
) -> Tensor:
    """`hidden_kl` from the dense model's summary, exact but for the rounding of the logits.

    Args:
        student: [positions, hidden], float32 or float64; the gradient goes here.
        summary: see `summary_of`, of the same temperature.
        head: affine, the same.
        temperature: see `kl_to_dense`.
        rows: see `over_rows`.

    Returns:
        [positions], of the student's dtype.
    """
    slope, offset = summary[:, :-1].double(), summary[:, -1].double()
    value = over_rows(student, head, _normaliser(temperature), rows)
    # Both are tens of nats, and their difference is not.
    kl: Tensor = value.double() - torch.linalg.vecdot(student.double(), slope) + offset
    return kl.to(student.dtype) * temperature**2


def _normaliser(temperature: float) -> Measure:
    return lambda logits, _: torch.logsumexp(logits / temperature, dim=-1)


def hidden_next_token_loss(hidden: Tensor, targets: Tensor, head: Head, rows: int = ROWS) -> Tensor:
    """Cross entropy of every position from final hidden states, in nats.

    Args:
        hidden: [positions, hidden]; the gradient goes here.
        targets: [positions] int64.
        head: see `over_rows`.
        rows: see `over_rows`.

    Returns:
        [positions], float32 (float64 for float64 logits).
    """
    return over_rows(hidden, head, lambda at, part: next_token_loss(at, targets[part]), rows)


def _parts(hidden: Tensor, rows: int) -> Iterator[slice]:
    # One part at least: no positions give an empty result of the right dtype.
    return (slice(start, start + rows) for start in range(0, max(len(hidden), 1), rows))


class _OverRows(torch.autograd.Function):
    """The gradient is taken with the value, so that no logits wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, head: Head, measure: Measure, rows: int
    ) -> Tensor:
        values = []
        gradient = torch.empty_like(hidden)
        for part in _parts(hidden, rows):
            with torch.enable_grad():
                some = hidden[part].detach().requires_grad_()
                value = measure(head(some), part)
                (gradient[part],) = torch.autograd.grad(value.sum(), some)
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * output[:, None].to(gradient.dtype), None, None, None
