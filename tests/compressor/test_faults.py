"""One test for each fault of the public code that must not come back.

The numbers are those under which the faults were listed: padding in the mean, the answer in
the mean, length one taken for decoding, state on the modules, skipping that saves nothing, a
constraint without pressure, a constraint per micro-batch, architectures accepted blindly. (The
ninth, router weights that nothing loads, is with the artifact.) Each test shows the fault's
symptom in a few lines; the details are in the test file of the module concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaForCausalLM,
    Olmo3Config,
    PreTrainedConfig,
)

from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.objective import (
    CapacityHinge,
    CapacityMultiplier,
    logistic_noise,
    straight_through_gate,
)
from mskip.compressor.router import Routers
from mskip.compressor.routing import HardPass
from mskip.compressor.skipping import MindSkip

Prompts = Callable[..., Batch]
MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def skip(model: LlamaForCausalLM, tiny_routers: Callable[..., Routers]) -> Iterator[MindSkip]:
    with torch.no_grad(), MindSkip(model, tiny_routers(model, [1, 2])) as attached:
        yield attached


def scores_of(skip: MindSkip, batch: Batch, **options: object) -> Tensor:
    named = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    return skip.model(**named, **options).past_key_values.scores


@pytest.mark.parametrize("side", ["left", "right"])
def test_fault_1_padding_in_the_mean(skip: MindSkip, prompt_batch: Prompts, side: str) -> None:
    """A sequence's routing depends on its batch-mates."""
    narrow = prompt_batch([5, 3, 4], side=side)
    wide = prompt_batch([5, 3, 4, 40], side=side)  # the same prompts and one that pads them
    assert torch.equal(narrow["input_ids"].sum(1), wide["input_ids"].sum(1)[:3])
    torch.testing.assert_close(
        scores_of(skip, wide)[:3], scores_of(skip, narrow), rtol=0, atol=1e-5
    )


def test_fault_2_answer_in_the_mean(skip: MindSkip, prompt_batch: Prompts) -> None:
    """In training and in scoring the router sees the answer; in generation it cannot."""
    batch = prompt_batch([6, 6, 6, 6])
    prompt = {key: value[:, :4] for key, value in batch.items()}
    prompt_mask = torch.tensor([[True] * 4 + [False] * 2]).expand(4, -1)
    generating = scores_of(skip, prompt)
    scoring = scores_of(skip, batch, prompt_mask=prompt_mask)
    torch.testing.assert_close(scoring, generating, rtol=0, atol=1e-5)
    # The answers would have made a difference.
    assert (scores_of(skip, batch) - generating).abs().max() > 0.05


def test_fault_3_length_one_is_taken_for_decoding(skip: MindSkip, prompt_batch: Prompts) -> None:
    """A one-token prompt is not decided, and a second turn is decided again."""
    ids = prompt_batch([5] * 6)["input_ids"]
    cache = skip.model(ids[:, :1]).past_key_values
    assert not cache.scores.isnan().any()
    assert torch.equal(cache.decisions, (cache.scores >= 0.5).to(torch.int8))
    scores, decisions = cache.scores.clone(), cache.decisions.clone()
    longer = skip.model(ids).past_key_values.decisions
    assert not torch.equal(longer, decisions)  # the whole prompt would be decided otherwise
    for part in (ids[:, 1:4], ids[:, 4:]):  # a turn of three tokens, a step of one
        skip.model(part, past_key_values=cache)
        assert torch.equal(cache.scores, scores)
        assert torch.equal(cache.decisions, decisions)


def tensors_and_values(model: nn.Module) -> list[tuple[str, object]]:
    """Everything the modules hold, tensors as bytes."""
    return [
        (f"{name}.{key}", value.numpy().tobytes() if isinstance(value, Tensor) else repr(value))
        for name, module in model.named_modules()
        for part in (module.__dict__, module._parameters, module._buffers)
        for key, value in part.items()
        if not isinstance(value, dict)
    ]


def test_fault_4_state_on_the_modules(skip: MindSkip, prompt_batch: Prompts) -> None:
    """Two generations cannot interleave."""
    one, other = (prompt_batch([6] * 4, seed=seed)["input_ids"] for seed in (0, 1))
    before = tensors_and_values(skip.model)
    caches = [skip.model(ids[:, :4]).past_key_values for ids in (one, other)]
    assert not torch.equal(caches[0].decisions, caches[1].decisions)
    woven = [
        skip.model(ids[:, 4:], past_key_values=cache).logits
        for ids, cache in zip((one, other), caches, strict=True)
    ]
    assert tensors_and_values(skip.model) == before
    for ids, logits in zip((one, other), woven, strict=True):
        cache = skip.model(ids[:, :4]).past_key_values
        assert torch.equal(skip.model(ids[:, 4:], past_key_values=cache).logits, logits)


def test_fault_5_skipping_that_saves_nothing(
    skip: MindSkip, prompt_batch: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention always runs and is multiplied by the mask; every step scores and synchronises."""
    rows: list[int] = []
    scored: list[int] = []
    looks: list[int] = []
    logit, start = Routers.logit, HardPass.__init__

    def count_logit(self: Routers, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
        scored.append(index)
        return logit(self, index, hidden, mask)

    def count_start(self: HardPass, *args: Tensor) -> None:
        looks.append(1)
        start(self, *args)

    monkeypatch.setattr(Routers, "logit", count_logit)
    monkeypatch.setattr(HardPass, "__init__", count_start)
    attention = skip.model.model.layers[1].self_attn
    hooks = [
        part.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    ]
    ids = prompt_batch([6] * 8)["input_ids"]
    cache = skip.model(ids[:, :4]).past_key_values
    for step in (4, 5):
        skip.model(ids[:, step : step + 1], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    executing = int(cache.decisions[:, 0].sum())
    assert 0 < executing < 8
    assert rows == [executing] * 4 * 3
    assert cache.layers[1].keys.shape[0] == executing
    assert scored == [0, 1]  # once a routed sublayer, at prefill
    assert len(looks) == 3  # one look at the decisions a call


def toy_tuning(
    constraint: CapacityMultiplier | CapacityHinge, steps: int = 300
) -> tuple[float, list[float]]:
    """Tune a toy router from all-zero logits; final capacity and that of every step.

    Eight sublayers on 64 samples; executing a sublayer lowers the loss, by sublayer more or
    less, so that without pressure everything executes.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator) / 4
    worth = torch.linspace(0.05, 0.5, 8)
    weight = torch.zeros(16, 8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.05)
    course = []
    for _ in range(steps):
        logit = inputs @ weight + bias
        gate = straight_through_gate(logit, 1.0, logistic_noise(logit, generator))
        task = -(gate * worth).sum(dim=1).mean()
        (task + constraint.penalty(gate.mean())).backward()
        optimiser.step()
        optimiser.zero_grad()
        course.append((logit >= 0).float().mean().item())
        constraint.observe(course[-1])
    final = (inputs @ weight + bias >= 0).float().mean().item()
    return final, course


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_fault_6_no_capacity_pressure(target: float) -> None:
    """Scale 0 is the shipped default; targets .1, .25 and .5 all end at about .7 executed."""
    capacity, course = toy_tuning(CapacityMultiplier(target, gain=4.0, integral_gain=0.1))
    assert course[0] == 1.0  # all-zero logits execute
    assert capacity == pytest.approx(target, abs=0.06)
    assert sum(course[-50:]) / 50 == pytest.approx(target, abs=0.06)


def test_fault_6_weight_zero_is_no_pressure() -> None:
    hinge = CapacityHinge(target=0.5, weight=0.0)
    assert hinge.price == 0.0
    assert toy_tuning(hinge)[0] == 1.0


@pytest.mark.parametrize("split", [1, 3, 12])
@pytest.mark.parametrize(
    "constraint",
    [CapacityMultiplier(0.5, 2.0, 0.1, integral=0.3, measured=0.8), CapacityHinge(0.5, 2.0, 0.8)],
    ids=["multiplier", "hinge"],
)
def test_fault_7_constraint_per_micro_batch(
    constraint: CapacityMultiplier | CapacityHinge, split: int
) -> None:
    """The hinge of a micro-batch of one punishes every executed sequence, not the average."""
    logit = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))

    def gradient(penalty: Callable[[Tensor], Tensor], size: int) -> Tensor:
        leaf = logit.clone().requires_grad_()
        for part in leaf.split(size):  # gradients add up, as in an optimiser step
            gate = straight_through_gate(part, 1.0, None)
            (penalty(gate.mean()) * (len(part) / 12)).backward()
        assert leaf.grad is not None
        return leaf.grad

    whole = gradient(constraint.penalty, 12)
    assert whole.abs().min() > 0
    torch.testing.assert_close(gradient(constraint.penalty, split), whole, rtol=1e-6, atol=0)

    def public(capacity: Tensor) -> Tensor:
        return 2.0 * (capacity - 0.5).clamp(min=0)

    differs = not torch.allclose(gradient(public, split), gradient(public, 12))
    assert differs == (split != 12)


EXTRA_NORMS: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "glm4": (Glm4Config, {"head_dim": 8}),
    "olmo3": (Olmo3Config, {}),
}


@pytest.mark.parametrize("name", EXTRA_NORMS)
def test_fault_8_architecture_whose_norms_would_be_dropped(name: str) -> None:
    """Duck typing accepts any layer with a `self_attn` and drops its extra norms in silence."""
    kind, options = EXTRA_NORMS[name]
    config = kind(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config)
    # It quacks: the public code would take it.
    assert model.model.layers[1].self_attn is not None
    before = dict(model.model.layers[1].self_attn.__dict__)
    with pytest.raises(ModelError, match=rf"architecture '{name}' is not supported"):
        MindSkip(model, Routers([1], 16))
    assert model.model.layers[1].self_attn.__dict__ == before
    assert not model._forward_pre_hooks


def test_fault_8_sliding_layers_are_refused(tiny_model: MakeModel) -> None:
    """A window shorter than the context would need a cache that no routed layer has."""
    model = tiny_model()
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ModelError, match="other than full attention"):
        MindSkip(model, Routers([1], 32))
