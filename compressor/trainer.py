"""transformers' Trainer with the capacity constraint.

bf16, accumulation, loggers, several processes and resume come from the
Trainer; checkpoints hold what was trained and nothing pickled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mskip.compressor.checkpoints import CheckpointMixin
from mskip.compressor.encoding import Batch, Sample, collate
from mskip.compressor.loss import RouterObjective
from mskip.compressor.objective import CapacityHinge, CapacityMultiplier, Step
from mskip.compressor.progress import Progress
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.sampling import GroupedByLength

Constraint = CapacityMultiplier | CapacityHinge


class _Indices(Dataset[dict[str, int]]):
    """The data set is a list of sample numbers; the collator knows the samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


class Collator:
    def __init__(self, samples: list[Sample], pad_id: int) -> None:
        self.samples, self.pad_id = samples, pad_id

    def __call__(self, rows: list[dict[str, int]]) -> Batch:
        batch = collate([self.samples[row["index"]] for row in rows], self.pad_id)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        # Shifted already; the Trainer counts them to average over answer tokens, not batches.
        targets = batch["input_ids"].roll(-1, dims=1).masked_fill(~batch["answer_mask"], -100)
        batch["labels"] = batch["shift_labels"] = targets
        return batch


class RouterTrainer(CheckpointMixin, Trainer):
    """The Trainer with the capacity constraint and router-only checkpoints."""

    def __init__(
        self, objective: RouterObjective, args: TrainingArguments, data: Collator,
        constraint: Constraint, spec: TuningSpec, progress: Progress,
        refine_rate: float | None = None,
    ) -> None:  # fmt: skip
        self.constraint = constraint
        self.target = constraint.target
        self.refine_rate = refine_rate
        self.spec = spec
        self.trace: list[Step] = []
        self.progress = progress
        self.lengths = [len(sample.input_ids) for sample in data.samples]
        self._seen: list[Tensor] = []
        self._units = 1  # of capacity: sequences, or tokens of their prompts
        self._in_force = 0.0, 0.0
        super().__init__(
            model=objective,
            args=args,
            train_dataset=_Indices(len(data.samples)),
            data_collator=data,
            callbacks=[_Course(self)],
        )
        # It would print a dict a step into whatever the progress is shown on.
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the compensation, where that is trained."""
        objective = self.accelerator.unwrap_model(self.model)
        if self.optimizer is None and objective.compensation is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            routers = [p for p in objective.routers.parameters() if p.requires_grad]
            maps = list(objective.compensation.parameters())
            self.optimizer = kind(
                [{"params": routers}, {"params": maps, "lr": self.refine_rate}],
                # AdamW's own default is not 0.
                **{**options, "weight_decay": self.args.weight_decay},
            )
        return super().create_optimizer()

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedByLength:
        self.sampler = GroupedByLength(
            self.lengths, self.args.per_device_train_batch_size, int(self.args.seed)
        )
        return self.sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the base class; also counts the units of capacity of the whole optimiser step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        unit = self.accelerator.unwrap_model(self.model).routers.sublayers.unit
        # Every sequence has a prompt; padding is no part of it.
        each = [
            int(batch["prompt_mask"].sum()) if unit == "token" else len(batch["index"])
            for batch in batches
        ]
        count = torch.tensor(sum(each), device=device)
        self._units = int(self.accelerator.reduce(count, reduction="sum"))
        return batches, items

    def noise_scale(self) -> float:
        """Scale of the gate noise at the current step: falls linearly to zero."""
        if self.spec.relaxation == "straight_through":
            return 0.0
        last = self.spec.noise_until * self.state.max_steps
        return max(0.0, 1.0 - self.state.global_step / last) if last else 0.0

    def target_in_force(self) -> float:
        """Capacity aimed at in the current step: falls linearly from 1 to the target."""
        last = self.spec.capacity_warmup * self.state.max_steps
        passed = min(1.0, self.state.global_step / last) if last else 1.0
        return self.target + (1.0 - self.target) * (1.0 - passed)  # the target itself at the end

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus the price of capacity, both averaged over the whole optimiser step."""
        noise = self.noise_scale()
        self.constraint.target = self.target_in_force()
        self._in_force = noise, self._get_learning_rate()
        outputs = model(
            **inputs,
            noise_scale=noise,
            noise_seed=self.args.seed * 1_000_003 + self.state.global_step,
            num_items_in_batch=num_items_in_batch,
        )
        logits = outputs["logits"]
        routed = logits.shape[1]
        capacity = torch.sigmoid(logits).sum() / (self._units * routed)
        executed = (logits.detach() >= 0).sum().float()
        self._seen.append(torch.stack([outputs["task"].detach().float(), executed]))
        loss = outputs["task"] + self.constraint.penalty(capacity)
        # Processes' gradients are averaged, but both terms are parts of one sum.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def end_step(self) -> None:
        """Tell the constraint what the whole step executed, and note the step."""
        task, executed = self.accelerator.reduce(torch.stack(self._seen).sum(0), reduction="sum")
        self._seen.clear()
        routed = self.accelerator.unwrap_model(self.model).routers.weight.shape[0]
        capacity = float(executed) / (self._units * routed)
        price = self.constraint.price
        self.constraint.observe(capacity)
        step = self.state.global_step
        self.trace.append(Step(step, float(task), capacity, price, *self._in_force))
        self.progress(
            "tune", step, self.state.max_steps, f"loss {float(task):.3f}  capacity {capacity:.2f}"
        )


class _Course(TrainerCallback):
    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # accelerate does not reach the sampler where several processes resume inside an epoch.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.end_step()
