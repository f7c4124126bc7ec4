"""Router-Tuning on transformers' Trainer: the backbone is frozen, the routers learn.

Source: arXiv 2410.13184, with the faults of its public code mended: decisions
from the prompt only, a capacity constraint that bites (stochastic gates, a
start from measured sensitivity, a multiplier), and checkpoints that hold the
routers alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainingArguments

from mskip.compressor.encoding import Sample
from mskip.compressor.errors import MskipError
from mskip.compressor.loss import RouterObjective
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import CapacityHinge, CapacityMultiplier, Step
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.trainer import Collator, Constraint, RouterTrainer


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
    refine_rate: float | None = None,
    fixed: bool = False,
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
        refine_rate: highest learning rate of the compensation, which is then trained too.
        fixed: the routers stay as they are, and only the compensation is trained.
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
    routers.requires_grad_(not fixed)
    routers.bias.requires_grad_(routers.trains_bias and not fixed)
    objective = RouterObjective(base, routers, spec, samples, refine=refine_rate is not None)
    trainer = RouterTrainer(
        objective,
        arguments,
        Collator(samples, int(base.tokenizer.pad_token_id)),
        make_constraint(spec, target, start_price),
        spec,
        progress,
        refine_rate,
    )
    found = trainer.newest_checkpoint() if resume else None
    if found is not None and trainer.restore_finished(found):
        return Tuned(_frozen(routers), trainer.trace)
    with patched(base.model, routers.sublayers), _stop_after_step(trainer) as flag:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if flag["stopped"] and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "a checkpoint is saved.",
            "Go on with: mskip tune --resume",
        )
    return Tuned(_frozen(routers).to(device), trainer.trace)


def _frozen(routers: Routers) -> Routers:
    if routers.sublayers.compensation is not None:
        routers.sublayers.compensation.requires_grad_(False)
    return routers.eval().requires_grad_(False)
