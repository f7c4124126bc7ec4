"""The contenders of `tuning_cost.py`: ours, the public recipe in three forms, and full fine-tuning.

See there for what each of them is.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mskip.compressor.encoding import Batch, Sample, collate
from mskip.compressor.families import family_of
from mskip.compressor.models import BaseModel
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.sampling import GroupedByLength
from mskip.compressor.tuning import tune

CAPACITY = 0.5


@dataclass(frozen=True)
class Job:
    """One piece of work, the same for all.

    Attributes:
        model: the recipe's model name.
        layers: routed decoder layers, ascending.
        samples: token ids and prompt length of each sample.
        batch_size: sequences in an optimiser step.
        steps: optimiser steps.
        seed: of the routers' start and of the order of the samples.
        threads: of torch; None leaves them alone.
    """

    model: str
    layers: list[int]
    samples: list[tuple[list[int], int]]
    batch_size: int
    steps: int
    seed: int = 0
    threads: int | None = None

    def tuning_samples(self) -> list[Sample]:
        return [Sample(ids, prompt) for ids, prompt in self.samples]

    def batches(self) -> list[list[int]]:
        """Sample numbers of every optimiser step, in the order of `RouterTrainer`."""
        order = GroupedByLength([len(ids) for ids, _ in self.samples], self.batch_size, self.seed)
        batches: list[list[int]] = []
        while len(batches) < self.steps:
            order.set_epoch(len(batches) // self.steps_per_epoch)
            numbers = list(order)
            batches += [
                numbers[start : start + self.batch_size]
                for start in range(0, len(numbers), self.batch_size)
            ]
        return batches[: self.steps]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)


@dataclass
class Course:
    """Of every optimiser step: seconds since the start when it ended, and its task loss."""

    seconds: list[float]
    losses: list[float]


def first_routers(layers: list[int], hidden: int, seed: int) -> Routers:
    """Routers that skip about every other layer, each prompt with a margin of its own."""
    routers = Routers(layers, hidden)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        routers.weight.normal_(std=0.5 / hidden**0.5, generator=generator)
        routers.bias.copy_(torch.tensor([1.0, -1.0]).repeat(len(layers))[: len(layers)])
    return routers


# -- contenders -------------------------------------------------------------------------------


def train_ours(job: Job, base: BaseModel, rate: float) -> Course:
    """`tune`, with the settings of the public code where it has any."""
    spec = TuningSpec(
        max_steps=job.steps, batch_size=job.batch_size, learning_rate=rate, seed=job.seed,
        lr_scheduler="constant", lr_scheduler_kwargs={}, warmup_ratio=0.0, bf16=False,
        relaxation="straight_through", temperature=1.0, constraint="hinge",
    )  # fmt: skip
    routers = first_routers(job.layers, base.model.config.hidden_size, job.seed)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcome = tune(
            base, routers, job.tuning_samples(), spec, CAPACITY, Path(folder),
            progress=lambda *_: ends.append(time.perf_counter() - start),
        )  # fmt: skip
    return Course(ends, [step.loss for step in outcome.trace])


@contextmanager
def plain_gates(
    base: BaseModel, layers: list[int], routers: Sequence[nn.Module], prompt_mask: Tensor
) -> Iterator[list[Tensor]]:
    """Multiply every routed attention's output by a hard gate; yields the gates as they are made.

    Args:
        base: the model.
        layers: routed decoder layers.
        routers: one a layer, [batch, hidden] -> [batch, 1].
        prompt_mask: [batch, sequence], true on prompt positions.
    """
    weights = prompt_mask / prompt_mask.sum(1, keepdim=True)
    gates: list[Tensor] = []

    def gated(router: nn.Module, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        score = torch.sigmoid(router((hidden * weights[..., None]).sum(1)))
        gate = (score >= 0.5).float() + score - score.detach()
        gates.append(gate)
        return output[0] * gate[..., None], *output[1:]

    modules = [family_of(base.model).attention_of(base.model, layer) for layer in layers]
    hooks = [
        module.register_forward_hook(partial(gated, router), with_kwargs=True)
        for module, router in zip(modules, routers, strict=True)
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def all_logits(base: BaseModel, batch: Batch, through: bool = False) -> Tensor:
    """[batch, sequence, vocabulary]; ``through``: the embeddings' output requires a gradient."""
    embedded = base.model.get_input_embeddings()(batch["input_ids"])
    if through:
        embedded.requires_grad_()
    inputs = {name: batch[name] for name in ("attention_mask", "position_ids")}
    logits: Tensor = base.model(inputs_embeds=embedded, use_cache=False, **inputs).logits
    return logits


def plain_next_token(student: Tensor, _: Tensor | None, batch: Batch) -> Tensor:
    targets = batch["input_ids"].roll(-1, dims=1).masked_fill(~batch["answer_mask"], -100)
    return F.cross_entropy(student.flatten(0, 1).float(), targets.flatten())


def plain_kl(student: Tensor, teacher: Tensor | None, batch: Batch) -> Tensor:
    assert teacher is not None
    ours, dense = (F.log_softmax(x[batch["answer_mask"]].float(), -1) for x in (student, teacher))
    return F.kl_div(ours, dense, log_target=True, reduction="none").sum(-1).mean()


def train_plain(
    job: Job, base: BaseModel, rate: float, *, kl: bool = False, through: bool = True
) -> Course:
    """The public recipe, see the top of this file."""
    start = first_routers(job.layers, base.model.config.hidden_size, job.seed)
    routers = [nn.Linear(start.hidden_size, 1) for _ in job.layers]
    with torch.no_grad():
        for index, router in enumerate(routers):
            router.weight.copy_(start.weight[index : index + 1])
            router.bias.copy_(start.bias[index : index + 1])

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        teacher = None
        if kl:
            with torch.no_grad():
                teacher = all_logits(base, batch)
        with plain_gates(base, job.layers, routers, batch["prompt_mask"]) as gates:
            student = all_logits(base, batch, through)
        task = (plain_kl if kl else plain_next_token)(student, teacher, batch)
        return task, task + F.relu(torch.cat(gates).mean() - CAPACITY)

    return _train(job, base, list(nn.ModuleList(routers).parameters()), rate, losses)


def train_full(job: Job, base: BaseModel, rate: float) -> Course:
    """Every parameter of the model."""
    base.model.requires_grad_(True)

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        task = plain_next_token(all_logits(base, batch), None, batch)
        return task, task

    return _train(job, base, list(base.model.parameters()), rate, losses)


def _train(
    job: Job,
    base: BaseModel,
    parameters: list[nn.Parameter],
    rate: float,
    losses: Callable[[Batch], tuple[Tensor, Tensor]],
) -> Course:
    samples, pad = job.tuning_samples(), int(base.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    course = Course([], [])
    start = time.perf_counter()
    for numbers in job.batches():
        task, loss = losses(collate([samples[number] for number in numbers], pad))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        course.losses.append(float(task.detach()))
        course.seconds.append(time.perf_counter() - start)
    return course


TRAIN: dict[str, Callable[[Job, BaseModel, float], Course]] = {
    "ours": train_ours,
    "plain": train_plain,
    "plain-stopped": partial(train_plain, through=False),
    "plain-kl": partial(train_plain, kl=True),
    "full": train_full,
}
