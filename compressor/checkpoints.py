"""Checkpoints of the tuner: what is trained and the optimiser in safetensors, the rest in JSON.

The Trainer would pickle the optimiser, the scheduler and the random states.
Here the order of the samples and the gate noise depend on seeds and the step
alone, so no random state needs saving, and everything else is plain data.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, whole_file, write_json
from mskip.compressor.objective import Step

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_TRAINED = "trained.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_PROGRESS = "progress.json"
_STATE = "trainer_state.json"


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(
            f"checkpoint file {path} is damaged: {error}.", "Start again without --resume."
        ) from error


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = read_json(checkpoint / _STATE, "state of the trainer")
    except ArtifactError:
        return None
    return state


class CheckpointMixin(_Base):
    """What `RouterTrainer` saves and restores; overrides the Trainer's own methods."""

    constraint: Any
    trace: list[Step]

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint in the output folder.

        The Trainer writes its state last, so a folder without it, or with half of it, was
        cut short.
        """
        folder = Path(str(self.args.output_dir))
        found = [path for path in folder.glob("checkpoint-*") if _state(path) is not None]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def restore_finished(self, checkpoint: Path) -> bool:
        """Load routers and trace of a run's last step; False, and nothing loaded, of another.

        The Trainer would go on for a further step where the last one was inside an epoch.
        """
        state = _state(checkpoint) or {}
        if state["global_step"] < state["max_steps"]:
            return False
        self._load_from_checkpoint(str(checkpoint))
        progress = read_json(checkpoint / _PROGRESS, "tuning progress")
        self.trace[:] = [Step(**row) for row in progress["trace"]]
        return True

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # One process of several writes.
            return
        folder = Path(str(output_dir or self.args.output_dir))
        # A folder of the same step was cut short, or it would not be written again.
        shutil.rmtree(folder, ignore_errors=True)
        # Routers, and the compensation where it is trained.
        state = self.accelerator.unwrap_model(self.model).state_dict()
        with whole_file(folder / _TRAINED) as path:
            safetensors.torch.save_file(state, path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{name}": value for i, each in state.items() for name, value in each.items()}
        with whole_file(Path(output_dir) / _OPTIMIZER) as path:
            safetensors.torch.save_file(flat, path)
        schedule = {
            name: value
            for name, value in self.lr_scheduler.state_dict().items()
            if isinstance(value, int | float | list) and name != "lr_lambdas"
        }
        write_json(
            Path(output_dir) / _PROGRESS,
            {
                "scheduler": schedule,
                "constraint": self.constraint.state(),
                "trace": [asdict(step) for step in self.trace],
            },
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing depends on a random state."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing depends on a random state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        objective = self.accelerator.unwrap_model(self.model)
        objective.load_state_dict(_load(Path(resume_from_checkpoint) / _TRAINED))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _load(Path(checkpoint) / _OPTIMIZER).items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        progress = read_json(Path(checkpoint) / _PROGRESS, "tuning progress")
        self.lr_scheduler.load_state_dict(
            {**self.lr_scheduler.state_dict(), **progress["scheduler"]}
        )
        # The scheduler hands its rate to the optimiser only after the next step.
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.constraint.restore(progress["constraint"])
        self.trace[:] = [Step(**row) for row in progress["trace"]]
