"""Router-Tuning on transformers' Trainer: the backbone is frozen, the routers learn.

Source: arXiv 2410.13184, with the faults of its public code mended: decisions
from the prompt only, a capacity constraint that bites (stochastic gates, a
start from measured sensitivity, a multiplier), and checkpoints that hold the
routers alone. Below the first routed layer nothing is differentiated, and
teacher and student share what is computed there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from mskip.compressor.errors import MskipError
from mskip.compressor.evaluation import answer_targets
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import (
    CapacityHinge,
    CapacityMultiplier,
    Step,
    kl_to_dense,
    next_token_loss,
    straight_through_gate,
)
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.routing import Execute
from mskip.compressor.sampling import GroupedByLength, gate_noise
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import patched
from mskip.compressor.stems import StemStore

Constraint = CapacityMultiplier | CapacityHinge


class RelaxedPass:
    """Training: every row is computed and multiplied by its gate.

    Args:
        routers: the routers being tuned.
        prompt_mask: [batch, sequence], true on prompt positions.
        temperature: of the gate's backward sigmoid.
        noise: logistic noise, [batch, routed], or None.
    """

    def __init__(
        self, routers: Routers, prompt_mask: Tensor, temperature: float, noise: Tensor | None
    ) -> None:
        self.routers = routers
        self.prompt_mask = prompt_mask
        self.temperature = temperature
        self.noise = noise
        self.logits: list[Tensor] = []

    def __call__(self, index: int, hidden: Tensor, execute: Execute) -> Tensor:
        """See `Pass`."""
        logit = self.routers.logit(index, hidden, self.prompt_mask)
        self.logits.append(logit)
        noise = None if self.noise is None else self.noise[:, index]
        gate = straight_through_gate(logit, self.temperature, noise)
        output = execute(None)
        return output * gate[:, None, None].to(output.dtype)


class _Indices(Dataset[dict[str, int]]):
    """The data set is a list of sample numbers; the collator knows the samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


class _Collator:
    def __init__(self, samples: list[Sample], pad_id: int) -> None:
        self.samples, self.pad_id = samples, pad_id

    def __call__(self, rows: list[dict[str, int]]) -> Batch:
        batch = collate([self.samples[row["index"]] for row in rows], self.pad_id)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        # Shifted already; the Trainer counts them to average over answer tokens, not batches.
        targets = batch["input_ids"].roll(-1, dims=1).masked_fill(~batch["answer_mask"], -100)
        batch["labels"] = batch["shift_labels"] = targets
        return batch


class RouterObjective(nn.Module):
    """Loss of one micro-batch; its only registered child is the routers.

    The backbone is deliberately no submodule: it must not be trained, saved,
    switched to training mode or wrapped for distributed training.

    Args:
        base: the dense model, patched while tuning.
        routers: the routers.
        spec: the recipe's tuning section.
        samples: the tuning samples, for the store of dense activations.
    """

    accepts_loss_kwargs = True

    def __init__(
        self, base: BaseModel, routers: Routers, spec: TuningSpec, samples: list[Sample]
    ) -> None:
        super().__init__()
        self.routers = routers
        self.spec = spec
        split = SplitModel(base.model, routers.layers[0])
        self.__dict__["split"] = split
        self.__dict__["store"] = StemStore(split, samples, int(spec.cache_gib * 2**30))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        prompt_mask: Tensor,
        answer_mask: Tensor,
        index: Tensor,
        noise_scale: float,
        noise_seed: int,
        num_items_in_batch: Tensor | int,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """Task loss and router logits.

        Args:
            input_ids: and the four masks, see `collate`.
            index: number of each sample, [batch] int64.
            noise_scale: of the gate noise, 0..1.
            noise_seed: with the sample's number, decides its noise.
            num_items_in_batch: answer tokens of the whole optimiser step.

        Returns:
            ``task``: sum over this micro-batch's answer tokens / num_items_in_batch.
            ``logits``: [batch, routed], float32.
        """
        split: SplitModel = self.__dict__["split"]
        store: StemStore = self.__dict__["store"]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "answer_mask": answer_mask,
        }
        stem, dense = store.get(batch, index)
        noise = None
        if noise_scale > 0:
            shape = (len(index), len(self.routers.layers))
            noise = gate_noise(noise_seed, index, shape[1]).to(input_ids.device) * noise_scale
        routing = RelaxedPass(self.routers, prompt_mask, self.spec.temperature, noise)
        hidden = split.finish(stem, routing)[answer_mask]
        student = split.logits(hidden)
        if self.spec.loss == "kl":
            with torch.no_grad():
                teacher = split.logits(dense)
            mean = kl_to_dense(student, teacher, self.spec.kl_temperature)
        else:
            mean = next_token_loss(student, answer_targets(batch))
        return {
            "task": mean * (len(hidden) / num_items_in_batch),
            "logits": torch.stack(routing.logits, dim=1),
        }


class RouterTrainer(CheckpointMixin, Trainer):
    """The Trainer with the capacity constraint and router-only checkpoints."""

    def __init__(
        self, objective: RouterObjective, args: TrainingArguments, data: _Collator,
        constraint: Constraint, spec: TuningSpec, progress: Progress,
    ) -> None:  # fmt: skip
        self.constraint = constraint
        self.spec = spec
        self.trace: list[Step] = []
        self.progress = progress
        self.lengths = [len(sample.input_ids) for sample in data.samples]
        self._seen: list[Tensor] = []
        self._sequences = 1
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

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedByLength:
        self.sampler = GroupedByLength(
            self.lengths, self.args.per_device_train_batch_size, int(self.args.seed)
        )
        return self.sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the base class; also counts the sequences of the whole optimiser step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["index"]) for batch in batches), device=device)
        self._sequences = int(self.accelerator.reduce(count, reduction="sum"))
        return batches, items

    def noise_scale(self) -> float:
        """Scale of the gate noise at the current step: falls linearly to zero."""
        if self.spec.relaxation == "straight_through":
            return 0.0
        last = self.spec.noise_until * self.state.max_steps
        return max(0.0, 1.0 - self.state.global_step / last) if last else 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus the price of capacity, both averaged over the whole optimiser step."""
        noise = self.noise_scale()
        self._in_force = noise, self._get_learning_rate()
        outputs = model(
            **inputs,
            noise_scale=noise,
            noise_seed=self.args.seed * 1_000_003 + self.state.global_step,
            num_items_in_batch=num_items_in_batch,
        )
        logits = outputs["logits"]
        routed = logits.shape[1]
        capacity = torch.sigmoid(logits).sum() / (self._sequences * routed)
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
        capacity = float(executed) / (self._sequences * routed)
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


@contextmanager
def _stop_after_step(trainer: RouterTrainer) -> Iterator[dict[str, bool]]:
    """First Ctrl-C ends training after the current step, with a checkpoint; the second at once."""
    flag = {"stopped": False}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> Any:
            # Several processes are told at different moments, and must stop after one step.
            told = torch.tensor(int(flag["stopped"]), device=args.device)
            if int(trainer.accelerator.reduce(told, reduction="sum")):
                flag["stopped"] = True
                control.should_save = control.should_training_stop = True
            return control

    def handler(number: int, frame: Any) -> None:
        if flag["stopped"]:
            raise KeyboardInterrupt
        flag["stopped"] = True

    trainer.add_callback(Stop())
    try:
        previous = signal.signal(signal.SIGINT, handler)
    except ValueError:  # Not the main thread: Ctrl-C is somebody else's.
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


class Interrupted(MskipError):
    """Tuning was stopped by Ctrl-C after saving a checkpoint."""


@dataclass
class Tuned:
    """Outcome of tuning.

    Attributes:
        routers: the tuned routers, frozen.
        trace: one entry an optimiser step.
    """

    routers: Routers
    trace: list[Step] = field(default_factory=list)

    def trace_json(self) -> list[dict[str, float]]:
        """The trace as JSON values."""
        return [asdict(step) for step in self.trace]


def make_constraint(spec: TuningSpec, target: float, start_price: float) -> Constraint:
    """The constraint of a recipe.

    Args:
        spec: the recipe's tuning section.
        target: wanted capacity.
        start_price: where the multiplier begins; it is also the unit of the gains, since
            what capacity is worth differs between models and targets. 0: the unit is 1 nat.
    """
    if spec.constraint == "hinge":
        return CapacityHinge(target, spec.hinge_weight)
    unit = start_price or 1.0
    return CapacityMultiplier(
        target, spec.constraint_gain * unit, spec.constraint_integral * unit, integral=start_price
    )


def _uses_bf16(spec: TuningSpec, device: torch.device) -> bool:
    if spec.bf16 != "auto":
        return spec.bf16
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Emulated bfloat16 is slower than float32; these units multiply it natively.
    native: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native


def tune(
    base: BaseModel,
    routers: Routers,
    samples: list[Sample],
    spec: TuningSpec,
    target: float,
    checkpoints: Path,
    *,
    start_price: float = 0.0,
    resume: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Tune the routers in place.

    Args:
        base: the frozen dense model.
        routers: initialised routers.
        samples: tuning samples with answers.
        spec: the recipe's tuning section.
        target: wanted capacity, 0..1.
        checkpoints: folder of the checkpoints.
        start_price: where the capacity multiplier begins, nats per unit of capacity.
        resume: go on from the newest checkpoint in the folder, if there is one.
        progress: one unit an optimiser step.

    Returns:
        The routers and the trace of all steps, those before a resume included.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    device = base.model.device
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps if spec.max_steps > 0 else -1,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        lr_scheduler_kwargs=dict(spec.lr_scheduler_kwargs),
        warmup_steps=spec.warmup_ratio,  # a share below 1 is a ratio
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=_uses_bf16(spec, device),
        seed=spec.seed,
        save_steps=spec.save_steps,
        save_total_limit=2,
        logging_steps=spec.logging_steps,
        report_to=list(spec.report_to),
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    routers.train()
    routers.requires_grad_(True)
    routers.bias.requires_grad_(routers.trains_bias)
    objective = RouterObjective(base, routers, spec, samples)
    trainer = RouterTrainer(
        objective,
        arguments,
        _Collator(samples, int(base.tokenizer.pad_token_id)),
        make_constraint(spec, target, start_price),
        spec,
        progress,
    )
    found = trainer.newest_checkpoint() if resume else None
    if found is not None and trainer.restore_finished(found):
        return Tuned(routers.eval().requires_grad_(False), trainer.trace)
    with patched(base.model, routers.layers), _stop_after_step(trainer) as flag:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if flag["stopped"] and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "a checkpoint is saved.",
            "Go on with: mskip tune --resume",
        )
    return Tuned(routers.eval().requires_grad_(False).to(device), trainer.trace)
