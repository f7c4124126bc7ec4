"""Routers: what they see, in which precision, and the affine form that is exported."""

import pytest
import torch

from mskip.compressor.router import Routers, prompt_mean


@pytest.fixture
def routers() -> Routers:
    """Three routers with nothing left at its default."""
    generator = torch.Generator().manual_seed(0)
    routers = Routers([1, 4, 6], 16)
    with torch.no_grad():
        routers.weight.normal_(generator=generator)
        routers.bias.normal_(generator=generator)
        routers.center.normal_(generator=generator)
        routers.scale.uniform_(0.5, 2.0, generator=generator)
    return routers


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_prompt_mean_is_the_mean_of_the_prompt_positions() -> None:
    hidden = noise(3, 5, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    expected = torch.stack(
        [row[chosen.bool()].mean(0) for row, chosen in zip(hidden, mask, strict=True)]
    )
    for kind in (torch.bool, torch.int64, torch.float32):
        mean = prompt_mean(hidden, mask.to(kind))
        torch.testing.assert_close(mean, expected)


def test_prompt_mean_ignores_padding_and_answer_whatever_they_hold() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    hidden = noise(2, 4, 8)
    other = torch.where(mask.unsqueeze(-1), hidden, 1e4 * noise(2, 4, 8, seed=2))
    assert not torch.equal(hidden, other)
    assert torch.equal(prompt_mean(hidden, mask), prompt_mean(other, mask))


def test_prompt_mean_of_nothing_is_zero() -> None:
    mean = prompt_mean(noise(2, 3, 4), torch.tensor([[False] * 3, [True] * 3]))
    assert torch.equal(mean[0], torch.zeros(4))
    assert mean[1].abs().min() > 0


def test_prompt_mean_adds_up_in_float32() -> None:
    hidden = (5 + noise(2, 1001, 4)).bfloat16()
    mean = prompt_mean(hidden, torch.ones(2, 1001, dtype=torch.bool))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, hidden.double().mean(dim=1).float(), rtol=1e-6, atol=0)


def test_logit_is_float32_and_the_same_under_autocast(routers: Routers) -> None:
    hidden, mask = noise(6, 5, 16), torch.ones(6, 5, dtype=torch.bool)
    plain = routers.logit(1, hidden, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # The surroundings do run in bfloat16; the router does not.
        assert (hidden[:, 0] @ routers.weight.T).dtype == torch.bfloat16
        assert torch.equal(routers.logit(1, hidden, mask), plain)
    assert plain.dtype == torch.float32
    assert routers.logit(1, hidden.bfloat16(), mask).dtype == torch.float32


def test_folded_is_the_same_map(routers: Routers) -> None:
    hidden, mask = noise(20, 5, 16), torch.ones(20, 5, dtype=torch.bool)
    mask[3:8, 2:] = False
    weight, bias = routers.folded()
    assert weight.shape == (3, 16)
    assert bias.shape == (3,)
    assert weight.dtype == bias.dtype == torch.float32
    assert not weight.requires_grad
    assert not bias.requires_grad
    for index in range(3):
        plain = prompt_mean(hidden, mask) @ weight[index] + bias[index]
        torch.testing.assert_close(plain, routers.logit(index, hidden, mask), rtol=1e-5, atol=1e-5)


def test_new_routers_are_the_papers() -> None:
    routers = Routers([3, 5], 8)
    hidden, mask = noise(4, 3, 8), torch.ones(4, 3, dtype=torch.bool)
    # sigmoid(0) = 0.5 >= tau = 0.5: an untrained router executes.
    assert torch.equal(torch.sigmoid(routers.logit(0, hidden, mask)), torch.full((4,), 0.5))
    with torch.no_grad():
        routers.weight.copy_(noise(2, 8, seed=3))
    torch.testing.assert_close(
        routers.logit(1, hidden, mask), prompt_mean(hidden, mask) @ routers.weight[1]
    )
    assert routers.layers == [3, 5]
    assert routers.hidden_size == 8


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_trained(bias: bool) -> None:
    trained = {name for name, p in Routers([1], 4, bias=bias).named_parameters() if p.requires_grad}
    assert trained == ({"weight", "bias"} if bias else {"weight"})


def test_state_goes_there_and_back(routers: Routers) -> None:
    other = Routers(routers.layers, 16)
    other.load_state_dict(routers.state_dict())
    hidden, mask = noise(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(other.logit(2, hidden, mask), routers.logit(2, hidden, mask))


def test_standardise_gives_mean_zero_and_variance_one_over_hidden(routers: Routers) -> None:
    inputs = 3.0 + noise(500, 3, 16) * torch.linspace(0.1, 5.0, 16)
    with torch.no_grad():
        routers.standardise(inputs)
        routers.weight.copy_(torch.eye(16)[:3])  # router j reads its feature j
        routers.bias.zero_()
    mask = torch.ones(500, 1, dtype=torch.bool)
    for index in range(3):
        logit = routers.logit(index, inputs[:, index].unsqueeze(1), mask)
        torch.testing.assert_close(logit.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(logit.var(correction=0), torch.tensor(1 / 16))


def test_standardise_survives_a_constant_feature() -> None:
    routers = Routers([0], 2)
    routers.standardise(torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]]))
    assert routers.scale.isfinite().all()
    assert routers.center.tolist() == [[2.0, 5.0]]
