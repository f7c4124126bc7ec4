"""The ablation's own part: what variants share, what is kept, and what the table says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import ablation
import pytest
import torch
from tiny_runs import WORDS

from mskip.compressor import baselines, router

VARIANTS = ["default", "start from zeros", "last prompt token"]


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Two seeds of three variants on the tiny model: four prompts to tune on, four held out."""
    rng = random.Random(0)
    turns = [[" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in "ab"] for _ in range(24)]
    data, recipe = tmp_path / "data.jsonl", tmp_path / "tiny.yaml"
    lines = [json.dumps({"instruction": ask, "output": answer}) for ask, answer in turns]
    data.write_text("\n".join(lines) + "\n", "utf-8")
    recipe.write_text(
        f"name: tiny\nmodel: {{name: '{tiny_folder}'}}\nrouting: {{layers: [1, 2, 3]}}\n", "utf-8"
    )
    return [
        *("ablation.py", "--recipe", str(recipe), "--data", str(data)),
        *("--output", str(tmp_path / "report.json"), "--variants", *VARIANTS),
        *("--seeds", "0", "1", "--samples", "4", "--held-out", "4"),
        *("--set", "tuning.epochs=1", "--set", "router.sensitivity_prompts=2"),
    ]


def test_finished_variants_are_kept(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []
    one = ablation.one

    def stopped(*given: Any, **options: Any) -> dict[str, Any]:
        if len(asked) == 4:
            raise KeyboardInterrupt
        seen = router.prompt_mean, baselines.prompt_mean
        asked.append({"held_out": given[3].held_out, "dense": given[4], "mean": seen, **options})
        return one(*given, **options)

    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(ablation, "one", stopped)
    usual = router.prompt_mean, baselines.prompt_mean
    with pytest.raises(KeyboardInterrupt):
        ablation.main()
    # A seed's variants share prompts and what the dense model gave; the next seed has its own.
    assert asked[0]["dense"] is asked[1]["dense"]
    assert asked[0]["held_out"] == asked[2]["held_out"] != asked[3]["held_out"]
    assert [each["usual"] for each in asked] == [True, False, False, True]
    # Only the variant that says so sees other positions, and its own run's start goes by them.
    assert [each["mean"] == usual for each in asked] == [True, True, False, True]
    assert (router.prompt_mean, baselines.prompt_mean) == usual
    asked.clear()
    ablation.main()
    assert len(asked) == 2
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    keys = [f"{name}/{seed}" for seed in (0, 1) for name in ("static", *VARIANTS)]
    assert list(report["results"]) == keys
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in VARIANTS)


def test_ratios_are_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def row(kl: float | None) -> dict[str, Any]:
        return {"routed_kl": kl, "routed_capacity": 0.5}

    results = {
        "static/0": {"kl": 4.0, "greedy": 2.0},
        "static/1": {"kl": 1.0, "greedy": 3.0},
        "default/0": row(1.0),
        "default/1": row(2.0),
        "other/0": row(3.0),
        "other/1": row(1.0),
        "once/1": row(4.0),
        "never/0": row(None),
    }
    ablation.show(results, ["default", "other", "once", "never", "not run"], [0, 1])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| default | 2 | 1.500 ± 0.707 | 1.250 ± 1.061 | 1.000 ± 0.000 | 0.500 ± 0.000 |",
        "| other | 2 | 2.000 ± 1.414 | 1.250 ± 0.354 | 1.750 ± 1.768 | 0.500 ± 0.000 |",
        "| once | 1 | 4.000 | 4.000 | 2.000 | 0.500 |",
        "| never | 0 | no tau reaches the capacity | | | |",
    ]


def test_mean_of_the_last_prompt_positions() -> None:
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    # Left padding, then the prompt, then an answer that no router sees.
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    last = ablation.mean_of_last(1)(hidden, mask)
    assert last.flatten().tolist() == [3.0, 8.0]
    two = ablation.mean_of_last(2)(hidden, mask)
    assert two.flatten().tolist() == [2.5, 7.5]
    assert torch.equal(ablation.mean_of_last(9)(hidden, mask), router.prompt_mean(hidden, mask))
