"""Gates, losses and the capacity constraint: values, gradients and what a checkpoint holds."""

import json
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from mskip.compressor.objective import (
    CapacityHinge,
    CapacityMultiplier,
    kl_to_dense,
    logistic_noise,
    next_token_loss,
    straight_through_gate,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.7])
@pytest.mark.parametrize("noisy", [False, True])
def test_gate_is_exactly_zero_or_one(temperature: float, noisy: bool) -> None:
    logit = torch.cat([torch.randn(5000, generator=generator()), torch.tensor([-1e4, -0.0, 1e4])])
    noise = logistic_noise(logit, generator(1)) if noisy else None
    gate = straight_through_gate(logit, temperature, noise)
    expected = (logit + noise if noise is not None else logit) >= 0
    assert gate.dtype == torch.float32
    assert torch.equal(gate, expected.float())  # bitwise: not 0.9999999


def test_gate_executes_at_zero() -> None:
    assert straight_through_gate(torch.zeros(1), 1.0, None).item() == 1.0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gate_has_the_gradient_of_a_sigmoid(temperature: float) -> None:
    logit = torch.linspace(-4, 4, 41).requires_grad_()
    noise = logistic_noise(logit, generator())
    weight = torch.randn(41, generator=generator(2))
    (straight_through_gate(logit, temperature, noise) * weight).sum().backward()
    soft = torch.sigmoid((logit.detach() + noise) / temperature)
    torch.testing.assert_close(logit.grad, weight * soft * (1 - soft) / temperature)


def test_noise_is_standard_logistic() -> None:
    noise = logistic_noise(torch.empty(400, 500), generator())
    assert noise.shape == (400, 500)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    flat = noise.flatten()
    assert flat.mean().abs() < 0.02
    assert flat.var() == pytest.approx(math.pi**2 / 3, rel=0.02)
    for x in (-3.0, -1.0, 0.0, 0.5, 2.0):  # P(noise <= x) = sigmoid(x)
        share = (flat <= x).float().mean().item()
        assert share == pytest.approx(1 / (1 + math.exp(-x)), abs=0.005)


def test_noise_depends_on_the_generator_only() -> None:
    like = torch.empty(7, 3)
    first = logistic_noise(like, generator(5))
    torch.manual_seed(99)
    assert torch.equal(logistic_noise(like, generator(5)), first)
    assert not torch.equal(logistic_noise(like, generator(6)), first)


# -- the losses -------------------------------------------------------------------------------


def two_logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(2, 11, 29, generator=generator())
    return logits[0].to(dtype), logits[1].to(dtype)


def test_kl_is_that_of_torch_distributions() -> None:
    student, teacher = two_logits()
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    other_way = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    assert not torch.isclose(expected, other_way, rtol=0.01).any()
    torch.testing.assert_close(kl_to_dense(student, teacher), expected)


def test_kl_with_temperature() -> None:
    student, teacher = two_logits()
    cool = kl_divergence(Categorical(logits=teacher / 2.5), Categorical(logits=student / 2.5))
    torch.testing.assert_close(kl_to_dense(student, teacher, 2.5), cool * 2.5**2)


def test_kl_of_equals_is_zero_and_has_no_gradient() -> None:
    student, _ = two_logits()
    student.requires_grad_()
    loss = kl_to_dense(student, student.detach())
    loss.mean().backward()
    assert torch.equal(loss, torch.zeros(11))
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-7)


def test_losses_are_float32_for_bfloat16_logits() -> None:
    student, teacher = two_logits(torch.bfloat16)
    targets = torch.arange(11)
    for loss, expected in (
        (kl_to_dense(student, teacher), kl_to_dense(student.float(), teacher.float())),
        (next_token_loss(student, targets), next_token_loss(student.float(), targets)),
    ):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


def test_next_token_loss_is_the_surprise() -> None:
    student, _ = two_logits()
    targets = torch.arange(11) + 5
    surprise = -Categorical(logits=student).log_prob(targets)
    torch.testing.assert_close(next_token_loss(student, targets), surprise)


# -- the constraint ---------------------------------------------------------------------------


def test_multiplier_is_a_proportional_integral_controller() -> None:
    multiplier = CapacityMultiplier(target=0.5, gain=2.0, integral_gain=0.1)
    assert multiplier.price == 0.0
    multiplier.observe(0.9)
    assert multiplier.price == pytest.approx(0.1 * 0.4 + 2.0 * 0.4)
    multiplier.observe(0.3)
    assert multiplier.integral == pytest.approx(0.1 * (0.4 - 0.2))
    assert multiplier.price == pytest.approx(0.1 * (0.4 - 0.2) - 2.0 * 0.2)
    assert multiplier.price < 0  # below the target capacity is paid for, not punished


def test_hinge_is_open_above_the_target_only() -> None:
    hinge = CapacityHinge(target=0.5, weight=3.0)
    prices = [hinge.price]
    for measured in (0.7, 0.5, 0.2):
        hinge.observe(measured)
        prices.append(hinge.price)
    assert prices == [3.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [CapacityMultiplier, CapacityHinge])
def test_penalty_is_linear_in_the_capacity(
    kind: type[CapacityMultiplier] | type[CapacityHinge],
) -> None:
    controller = kind(0.5, 2.0, 0.1, integral=0.4) if kind is CapacityMultiplier else kind(0.5, 2.0)
    controller.observe(0.8)
    capacity = torch.tensor(0.8, requires_grad=True)
    penalty = controller.penalty(capacity)
    penalty.backward()
    assert penalty.item() == pytest.approx(controller.price * 0.8)
    assert capacity.grad.item() == pytest.approx(controller.price)
    assert controller.price > 0


def test_controllers_go_through_a_checkpoint() -> None:
    trained = CapacityMultiplier(0.5, gain=2.0, integral_gain=0.1), CapacityHinge(0.5, weight=3.0)
    fresh = CapacityMultiplier(0.5, gain=2.0, integral_gain=0.1), CapacityHinge(0.5, weight=3.0)
    for before, after in zip(trained, fresh, strict=True):
        after.restore(json.loads(json.dumps(before.state())))  # before the first step
        assert after == before
        for measured in (0.9, 0.8, 0.1):
            before.observe(measured)
        assert after.price != before.price
        after.restore(json.loads(json.dumps(before.state())))
        assert after == before
        assert after.price == before.price
        before.observe(0.7)
        after.observe(0.7)
        assert after.price == before.price
