"""Checkpoints of tuning: what they hold, and that an interruption changes nothing."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from router_tuning import LAYERS, assert_same_outcome, spec, start
from safetensors.torch import load_file

from mskip.compressor.checkpoints import CheckpointMixin
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import ArtifactError
from mskip.compressor.models import BaseModel
from mskip.compressor.router import Routers
from mskip.compressor.tuning import Interrupted, Tuned, tune

MakeSamples = Callable[..., list[Sample]]


def test_checkpoints_hold_routers_and_plain_data(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers only, in safetensors and JSON; nothing is pickled."""
    monkeypatch.setattr(torch, "save", refuse)
    routers, price = start(base, LAYERS, make_samples(16), 0.5)
    wanted = spec(max_steps=6, save_steps=2)
    tune(base, routers, make_samples(16), wanted, 0.5, tmp_path, start_price=price)
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-6"]  # the last two
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == [
            "optimizer.safetensors",
            "progress.json",
            "trained.safetensors",
            "trainer_state.json",
        ]
        saved = load_file(folder / "trained.safetensors")
        assert set(saved) == {f"routers.{name}" for name in ("weight", "bias", "center", "scale")}
    for name, value in routers.state_dict().items():
        assert torch.equal(saved[f"routers.{name}"], value)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 8 * routers.weight.numel() * 4


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("something is pickled")


def interrupt_at(step: int, times: int = 1) -> Callable[..., None]:
    """A progress that presses Ctrl-C at a step."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return progress


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [2, 4, 7])
def test_interrupted_and_resumed_is_uninterrupted(
    base: BaseModel,
    make_samples: MakeSamples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    accumulation: int,
) -> None:
    """Ctrl-C in the first, second or third epoch leaves one checkpoint, and --resume goes on."""
    samples = make_samples(24, prompt=(6, 6), answer=(4, 4))
    wanted = spec(batch_size=8 // accumulation, gradient_accumulation=accumulation)

    def run(folder: str, **options: Any) -> Tuned:
        routers, price = start(base, LAYERS, samples, 0.5)
        folder_path = tmp_path / folder
        return tune(base, routers, samples, wanted, 0.5, folder_path, start_price=price, **options)

    whole = run("whole")
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 8") as caught:
        run("cut", progress=interrupt_at(step))
    assert "--resume" in caught.value.remedy
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [f"checkpoint-{step}"]
    assert all("forward" not in layer.self_attn.__dict__ for layer in base.model.model.layers)
    # What a run that was killed in the middle of a checkpoint leaves.
    half = tmp_path / "cut" / f"checkpoint-{step + 1}"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    resumed = run("cut", resume=True)
    assert_same_outcome(resumed, whole, 1e-7)


def test_a_cut_state_file_makes_no_checkpoint(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """The Trainer does not write its state whole; a cut one is a checkpoint cut short."""
    samples = make_samples(16)
    wanted = spec(max_steps=4, save_steps=2)
    routers, price = start(base, LAYERS, samples, 0.5)
    whole = tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    seen: list[int] = []
    routers, _ = start(base, LAYERS, samples, 0.5)
    resumed = tune(
        base, routers, samples, wanted, 0.5, tmp_path, start_price=price, resume=True,
        progress=lambda stage, done, total, note="": seen.append(done),
    )  # fmt: skip
    assert seen == [3, 4]
    assert_same_outcome(resumed, whole, 1e-5)


def test_resuming_what_is_finished_changes_nothing(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """Also where the last step is in the middle of an epoch."""
    samples = make_samples(24)
    routers, price = start(base, LAYERS, samples, 0.5)
    wanted = spec(max_steps=5)
    whole = tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price)
    routers, _ = start(base, LAYERS, samples, 0.5)
    again = tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price, resume=True)
    assert_same_outcome(again, whole, 0.0)


def test_second_ctrl_c_stops_at_once(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(
            base, Routers(LAYERS, 32), make_samples(16), spec(), 0.5, tmp_path,
            progress=interrupt_at(2, times=2),
        )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is handler
    assert all("forward" not in layer.self_attn.__dict__ for layer in base.model.model.layers)


def test_ctrl_c_in_the_last_step_is_no_interruption(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    progress = interrupt_at(3)
    routers = Routers(LAYERS, 32)
    wanted = spec(max_steps=3)
    outcome = tune(base, routers, make_samples(16), wanted, 0.5, tmp_path, progress=progress)
    assert len(outcome.trace) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_without_a_checkpoint_it_starts_anew(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, resume: bool
) -> None:
    samples, wanted = make_samples(16), spec(max_steps=2)
    outcome = tune(base, Routers(LAYERS, 32), samples, wanted, 0.5, tmp_path / "new", resume=resume)
    assert [step.step for step in outcome.trace] == [1, 2]


def test_without_resume_a_checkpoint_is_left_alone(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples, wanted = make_samples(16), spec(max_steps=2)
    outcomes = [tune(base, Routers(LAYERS, 32), samples, wanted, 0.5, tmp_path) for _ in range(2)]
    assert_same_outcome(outcomes[1], outcomes[0], 0.0)


@pytest.mark.parametrize("damage", ["trained", "optimizer", "progress", "no optimizer"])
def test_damaged_checkpoint(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, damage: str
) -> None:
    samples, routers = make_samples(16), Routers(LAYERS, 32)
    with pytest.raises(Interrupted):
        tune(base, routers, samples, spec(), 0.5, tmp_path, progress=interrupt_at(2))
    folder = tmp_path / "checkpoint-2"
    if damage == "progress":
        (folder / "progress.json").write_text("{")
    elif damage == "no optimizer":
        (folder / "optimizer.safetensors").unlink()
    else:
        path = folder / f"{damage}.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"checkpoint-2.*(progress|trained|optimizer)"):
        tune(base, Routers(LAYERS, 32), samples, spec(), 0.5, tmp_path, resume=True)


def test_newest_checkpoint_goes_by_number(tmp_path: Path) -> None:
    class Arguments:
        output_dir = str(tmp_path)

    trainer = CheckpointMixin()
    trainer.args = Arguments()
    assert trainer.newest_checkpoint() is None
    for step in (8, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    assert trainer.newest_checkpoint() == tmp_path / "checkpoint-100"
