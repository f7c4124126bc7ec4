"""The mathematics of router tuning: gates, losses and the capacity constraint.

Pure functions and one small controller; the plumbing is in ``tuning``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard logistic noise with the shape of ``like``, float32."""
    uniform = torch.rand(like.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return (torch.log(uniform) - torch.log1p(-uniform)).to(like.device)


def straight_through_gate(logit: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """A gate that is 0 or 1 forward and a sigmoid backward.

    With noise this is the binary concrete (Gumbel-sigmoid) relaxation of
    Maddison et al., arXiv 1611.00712, made hard in the forward pass as the
    executed model is; without, the plain straight-through gate of the paper.

    Args:
        logit: router logits, any shape, float32.
        temperature: of the sigmoid in the backward pass; smaller is steeper.
        noise: logistic noise of the same shape, or None.

    Returns:
        Gate of the same shape, float32: exactly 0 or 1 in value.
    """
    noisy = logit if noise is None else logit + noise
    soft = torch.sigmoid(noisy / temperature)
    hard = (noisy >= 0).to(soft.dtype)
    # Grouped so that the value is exactly `hard`: hard + (soft - soft).
    return hard + (soft - soft.detach())


def kl_to_dense(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of every position, in nats.

    Written with two normalisers a row, so that no table of log probabilities is made.

    Args:
        student: logits, [positions, vocabulary].
        teacher: logits of the dense model, same shape; no gradient.
        temperature: both logits are divided by it; the result is multiplied by
            its square (Hinton et al., arXiv 1503.02531).

    Returns:
        [positions], float32 (float64 for float64 logits).
    """
    student, teacher = (_precise(logits) / temperature for logits in (student, teacher))
    expected: Tensor = torch.linalg.vecdot(torch.softmax(teacher, dim=-1), teacher - student)
    normalisers = torch.logsumexp(teacher, dim=-1) - torch.logsumexp(student, dim=-1)
    return (expected - normalisers) * temperature**2


def next_token_loss(student: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every position in nats, as `kl_to_dense`; targets [positions] int64."""
    return F.cross_entropy(_precise(student), targets, reduction="none")


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass
class Step:
    """One optimiser step of tuning.

    Attributes:
        step: counted from 1.
        loss: task loss, nats per answer token (the capacity penalty is not in it).
        capacity: share of calls with score >= 0.5, without gate noise.
        price: price of capacity during the step.
        noise: scale of the gate noise.
        learning_rate: of the step.
    """

    step: int
    loss: float
    capacity: float
    price: float
    noise: float
    learning_rate: float


@dataclass
class CapacityMultiplier:
    """Lagrange multiplier that holds the executed share at a target.

    A proportional-integral controller on the multiplier (Stooke et al., arXiv
    2007.03964). What it measures is the share of calls that *would be
    executed* (noise-free, score >= 0.5), so its fixed point is the capacity at
    inference, not the mean probability. Within an optimiser step the price is
    a constant: the penalty is linear in the capacity, so splitting a batch
    over micro-batches or processes changes nothing (the public code's hinge
    per micro-batch of one punishes every executed sequence).

    Attributes:
        target: wanted capacity, 0..1.
        gain: price per unit of excess capacity, nats.
        integral_gain: growth of the price per step and unit of excess capacity, nats.
        integral: the accumulated part of the price.
        measured: capacity over the last optimiser step.
    """

    target: float
    gain: float
    integral_gain: float
    integral: float = 0.0
    measured: float | None = None

    @property
    def price(self) -> float:
        """What one unit of capacity costs in the loss; negative below the target."""
        excess = 0.0 if self.measured is None else self.measured - self.target
        return self.integral + self.gain * excess

    def penalty(self, capacity: Tensor) -> Tensor:
        """Term for the loss: the price times the (differentiable) capacity of this micro-batch."""
        return self.price * capacity

    def observe(self, measured: float) -> None:
        """Record the capacity of a whole optimiser step, all processes together."""
        self.measured = measured
        self.integral += self.integral_gain * (measured - self.target)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint must hold."""
        return {"integral": self.integral, "measured": self.measured}

    def restore(self, state: dict[str, float | None]) -> None:
        """Continue from a checkpoint."""
        self.integral = float(state["integral"] or 0.0)
        self.measured = state["measured"]


@dataclass
class CapacityHinge:
    """The paper's constraint: ``weight * max(0, capacity - target)``, once per optimiser step.

    The hinge is open or shut according to the last whole step's capacity, so
    it does not depend on micro-batches either.

    Attributes:
        target: wanted capacity, 0..1.
        weight: lambda of the paper.
        measured: capacity over the last optimiser step.
    """

    target: float
    weight: float
    measured: float | None = None

    @property
    def price(self) -> float:
        """The weight where the last step was above the target, else zero."""
        return self.weight if self.measured is None or self.measured > self.target else 0.0

    def penalty(self, capacity: Tensor) -> Tensor:
        """Term for the loss."""
        return self.price * capacity

    def observe(self, measured: float) -> None:
        """Record the capacity of a whole optimiser step, all processes together."""
        self.measured = measured

    def state(self) -> dict[str, float | None]:
        """What a checkpoint must hold."""
        return {"measured": self.measured}

    def restore(self, state: dict[str, float | None]) -> None:
        """Continue from a checkpoint."""
        self.measured = state["measured"]
