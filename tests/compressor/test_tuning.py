"""Tuning: what is trained, what holds the capacity, and that nothing depends on micro-batches or
processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from router_tuning import LAYERS, assert_same_outcome, assert_same_trace, spec, start
from safetensors.torch import load_file, save_file
from torch import Tensor

from mskip.compressor.calibration import PromptScorer
from mskip.compressor.encoding import Sample, collate
from mskip.compressor.loss import RouterObjective
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import Step
from mskip.compressor.patching import passing, patched
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.routing import Call
from mskip.compressor.sampling import GroupedByLength
from mskip.compressor.tuning import tune

MakeBase = Callable[..., BaseModel]
MakeSamples = Callable[..., list[Sample]]


def executed_share(base: BaseModel, routers: Routers, samples: list[Sample]) -> float:
    """Capacity at tau 0.5, in the real gated forward pass."""
    with patched(base.model, routers.layers):
        scorer = PromptScorer(base, routers, samples)
        tau = torch.full((len(routers.layers),), 0.5)
        decisions, _ = scorer(tau, list(range(len(samples))))
    return float(decisions.float().mean())


# -- the constraint ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(make_base: MakeBase) -> tuple[BaseModel, list[int]]:
    """Ten layers, of which eight are routed: capacity has steps of an eighth a prompt."""
    return make_base(1, num_hidden_layers=10), list(range(1, 9))


@pytest.mark.parametrize("target", [0.75, 0.5, 0.25])
def test_constraint_holds_the_target(
    deep: tuple[BaseModel, list[int]], make_samples: MakeSamples, tmp_path: Path, target: float
) -> None:
    """With it every target is met before any calibration; without it everything executes."""
    base, layers = deep
    tuning, held_out = (make_samples(96, seed, prompt=(6, 10)) for seed in (0, 5))
    reached = {}
    for pressed, settings in ((True, {}), (False, {"constraint": "hinge", "hinge_weight": 0.0})):
        routers, price = start(base, layers, tuning, target, scale=1.5)
        wanted = spec(max_steps=40, batch_size=16, **settings)
        outcome = tune(base, routers, tuning, wanted, target, tmp_path, start_price=price)
        assert outcome.trace[0].capacity == pytest.approx(target, abs=0.05)
        reached[pressed] = [executed_share(base, routers, part) for part in (tuning, held_out)]
    assert reached[True] == pytest.approx([target, target], abs=0.1)
    assert min(reached[False]) > 0.8


# -- what is trained, and what is not ---------------------------------------------------------


def test_backbone_stays_as_it_was(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(16)
    routers, price = start(base, LAYERS, samples, 0.5)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    fresh = {name: value.clone() for name, value in routers.state_dict().items()}
    tune(base, routers, samples, spec(max_steps=3), 0.5, tmp_path, start_price=price)
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert all("forward" not in layer.self_attn.__dict__ for layer in base.model.model.layers)
    changed = {n for n, value in routers.state_dict().items() if not torch.equal(value, fresh[n])}
    assert changed == {"weight", "bias"}
    assert not any(parameter.requires_grad for parameter in routers.parameters())


def test_a_router_without_bias_gets_none(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    routers = Routers(LAYERS, 32, bias=False)
    tune(base, routers, make_samples(16), spec(max_steps=3), 0.5, tmp_path)
    assert not routers.bias.any()
    assert routers.weight.any()


# -- the loss ---------------------------------------------------------------------------------


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in the order of their numbers, so that the sets of a step can be compared."""
    monkeypatch.setattr(GroupedByLength, "__iter__", lambda self: iter(range(len(self.lengths))))


@pytest.mark.usefixtures("in_order")
def test_accumulation_changes_nothing(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """The loss is the mean over the answer tokens of the whole step, however it is cut up."""
    samples = make_samples(24, answer=(1, 12))
    outcomes = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        routers, price = start(base, LAYERS, samples, 0.5)
        wanted = spec(batch_size=size, gradient_accumulation=accumulation, max_steps=6)
        outcomes.append(tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price))
    assert_same_outcome(outcomes[1], outcomes[0], 1e-5)
    assert_same_outcome(outcomes[2], outcomes[0], 1e-5)


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_first_loss_is_that_of_the_start(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, loss: str
) -> None:
    """All-zero routers execute everything: KL zero, next-token loss that of the dense model."""
    samples = make_samples(16)
    routers = Routers(LAYERS, 32)
    wanted = spec(loss=loss, relaxation="straight_through", max_steps=2)
    trace = tune(base, routers, samples, wanted, 0.5, tmp_path).trace
    batch = collate(samples[:8], 0)
    logits = base.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    surprise = F.cross_entropy(
        logits[batch["answer_mask"]], batch["input_ids"].roll(-1, 1)[batch["answer_mask"]]
    )
    assert trace[0].loss == pytest.approx(surprise.item() if loss == "lm" else 0.0, abs=1e-5)
    assert trace[0].capacity == 1.0


@pytest.mark.usefixtures("in_order")
def test_paper_form(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero start, straight-through gates, hinge: the gradient of LM loss + lambda * hinge."""
    weight, target = 3.0, 0.4
    samples = make_samples(8)
    routers = Routers(LAYERS, 32, bias=False)
    gradients: list[Tensor] = []
    forward = RouterObjective.forward

    def watch(self: RouterObjective, *args: Any, **kwargs: Any) -> Any:
        if not gradients:
            routers.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(RouterObjective, "forward", watch)
    wanted = spec(
        loss="lm",
        relaxation="straight_through",
        temperature=1.0,
        constraint="hinge",
        hinge_weight=weight,
        max_steps=1,
    )
    tune(base, routers, samples, wanted, target, tmp_path)

    own = torch.zeros(len(LAYERS), 32, requires_grad=True)
    batch = collate(samples, 0)
    mask = batch["prompt_mask"].float()[..., None]
    gates = []

    def routing(call: Call) -> Tensor:
        mean = (call.hidden * mask).sum(1) / mask.sum(1)
        score = torch.sigmoid(mean @ own[call.index])
        gate = (score >= 0.5).float() + score - score.detach()
        gates.append(gate)
        return call.execute(None) * gate[:, None, None]

    with patched(base.model, LAYERS), passing(routing):
        hidden = base.model.model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
    logits = base.model.lm_head(hidden[batch["answer_mask"]])
    answers = batch["input_ids"].roll(-1, 1)[batch["answer_mask"]]
    capacity = torch.stack(gates).mean()
    hinge = weight * (capacity - target).clamp(min=0)
    (F.cross_entropy(logits, answers) + hinge).backward()
    torch.testing.assert_close(gradients[0], own.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_runs(base: BaseModel, make_samples: MakeSamples, tmp_path: Path) -> None:
    """Under autocast the scores stay float32 and the loss finite."""
    samples = make_samples(16)
    routers, price = start(base, LAYERS, samples, 0.5)
    outcome = tune(base, routers, samples, spec(bf16=True), 0.5, tmp_path, start_price=price)
    assert all(0 <= step.loss < 100 for step in outcome.trace)
    assert outcome.routers.weight.dtype == torch.float32
    assert outcome.routers.weight.isfinite().all()


# -- the course of a run ----------------------------------------------------------------------


def test_trace_holds_what_was_in_force_during_the_step(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(16)
    routers, price = start(base, LAYERS, samples, 0.5)
    shown: list[tuple[str, int, int]] = []
    wanted = spec(
        max_steps=4, warmup_ratio=0.0, lr_scheduler="linear", lr_scheduler_kwargs={}, noise_until=1
    )
    trace = tune(
        base, routers, samples, wanted, 0.5, tmp_path, start_price=price,
        progress=lambda stage, done, total, note="": shown.append((stage, done, total)),
    ).trace  # fmt: skip
    assert [step.learning_rate for step in trace] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [step.noise for step in trace] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert trace[0].price == pytest.approx(price)
    assert trace[1].price == pytest.approx(price * (1 + 6.4 * (trace[0].capacity - 0.5)))
    assert shown == [("tune", done, 4) for done in (1, 2, 3, 4)]


def test_the_target_falls_from_everything(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """Over three of four steps: 1, 5/6, 4/6, 3/6. Capacity is paid for by what was in force."""
    routers, price = start(base, LAYERS, make_samples(16), 0.5)
    wanted = spec(max_steps=4, capacity_warmup=0.75)
    trace = tune(base, routers, make_samples(16), wanted, 0.5, tmp_path, start_price=price).trace
    aimed = [1, 5 / 6, 4 / 6, 3 / 6]
    summed = price
    for number in range(1, 4):
        before = trace[number - 1].capacity
        summed += 0.4 * price * (before - aimed[number - 1])
        assert trace[number].price == pytest.approx(summed + 6 * price * (before - aimed[number]))


def test_every_epoch_has_its_own_order_and_every_step_its_own_noise(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[list[int]] = []
    noise: list[int] = []
    forward = RouterObjective.forward

    def watch(self: RouterObjective, **kwargs: Any) -> Any:
        order.append(kwargs["index"].tolist())
        noise.append(kwargs["noise_seed"])
        return forward(self, **kwargs)

    monkeypatch.setattr(RouterObjective, "forward", watch)
    routers = Routers(LAYERS, 32)
    tune(base, routers, make_samples(24), spec(max_steps=-1, epochs=2.0), 0.5, tmp_path)
    first, second = ([i for batch in part for i in batch] for part in (order[:3], order[3:]))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert len(set(noise)) == 6


# -- several processes ------------------------------------------------------------------------


def run_processes(folder: Path, count: int) -> list[dict[str, Any]]:
    """Run the job in ``folder`` as torchrun would, on gloo, and read what each process made."""
    processes.run_processes(Path(__file__).with_name("two_processes.py"), folder, count, 120)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def test_two_processes_agree_with_one(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """Two processes of four samples a step are one process of two times four.

    accelerate deals whole batches in turn: what are two micro-batches in one process
    are the two processes' batches here.
    """
    samples = make_samples(32, answer=(1, 12))
    routers, price = start(base, LAYERS, samples, 0.5)
    settings = {"bf16": False, "max_steps": 10, "batch_size": 4, "save_steps": 4}
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    save_file(routers.state_dict(), tmp_path / "start.safetensors")
    job = {
        "layers": LAYERS,
        "samples": [[sample.input_ids, sample.prompt_length] for sample in samples],
        "spec": settings,
        "target": 0.5,
        "price": price,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    ranks = run_processes(tmp_path, 2)
    single = tune(
        base, routers, samples, TuningSpec(**settings, gradient_accumulation=2), 0.5,
        tmp_path / "single", start_price=price,
    )  # fmt: skip
    expected = {"weight": routers.weight.tolist(), "bias": routers.bias.tolist()}
    for rank in ranks:
        # The keyboard reached one of the two: both stopped after the same step.
        assert rank["interrupted"] == "stopped at step 5 of 10; a checkpoint is saved."
        for kind in ("whole", "resumed"):
            result = rank[kind]
            assert result["processes"] == 2
            for name, value in expected.items():
                torch.testing.assert_close(
                    torch.tensor(result[name]), torch.tensor(value), rtol=0, atol=1e-5
                )
            assert_same_trace([Step(**row) for row in result["trace"]], single.trace, 1e-5)
    assert ranks[0] == ranks[1]
    # One of the processes wrote the checkpoints, and they hold what both have.
    folders = [path.name for path in (tmp_path / "whole").iterdir()]
    assert sorted(folders) == ["checkpoint-10", "checkpoint-8"]
    saved = load_file(tmp_path / "whole" / "checkpoint-10" / "trained.safetensors")
    assert torch.equal(saved["routers.weight"], torch.tensor(ranks[0]["whole"]["weight"]))
