"""What the benchmark of tuning claims of its contenders: they train, their losses are the same
where they must be, and its arithmetic counts what PyTorch counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import tuning_arithmetic
import tuning_contenders
import tuning_cost
from torch import Tensor

if TYPE_CHECKING:
    from mskip.compressor.models import BaseModel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tuning_cost.py"
LAYERS = [1, 2]
STILL = 1e-12  # A learning rate at which nothing moves.
CONTENDERS = ["ours", "plain", "plain-stopped", "plain-kl", "full"]


@pytest.fixture(scope="module")
def job(tiny_folder: Path) -> Any:
    """Two epochs of two steps; one batch is short, lengths differ, and epochs mix them anew."""
    rng = random.Random(0)
    samples = []
    for _ in range(7):
        prompt, answer = rng.randint(6, 8), rng.randint(4, 6)
        samples.append(([rng.randrange(4, 90) for _ in range(prompt + answer)], prompt))
    return tuning_contenders.Job(str(tiny_folder), LAYERS, samples, batch_size=4, steps=4)


@pytest.fixture(scope="module")
def load(tiny_folder: Path) -> Callable[[], BaseModel]:
    """Loads the model anew: full fine-tuning changes it."""
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import ModelSpec

    return lambda: load_base(ModelSpec(name=str(tiny_folder)))


@pytest.fixture(scope="module")
def courses(job: Any, load: Callable[[], BaseModel]) -> dict[str, Any]:
    """Every contender at a learning rate of zero, all but."""
    assert list(tuning_contenders.TRAIN) == CONTENDERS
    return {name: train(job, load(), STILL) for name, train in tuning_contenders.TRAIN.items()}


# -- losses -----------------------------------------------------------------------------------


def test_same_loss_is_the_same(courses: dict[str, Any]) -> None:
    """At every step, so the batches and their order are the same too."""
    ours, plain = courses["ours"].losses, courses["plain-kl"].losses
    assert min(ours) > 0.05  # some gates are shut
    assert len(set(ours)) == len(ours)  # no two batches are the same
    assert ours == pytest.approx(plain, rel=1e-4)


def test_stopping_backward_changes_no_loss(courses: dict[str, Any]) -> None:
    assert courses["plain"].losses == pytest.approx(courses["plain-stopped"].losses, rel=1e-6)
    # Full fine-tuning has no gates, the plain recipe has, and some are shut.
    assert courses["plain"].losses[0] != pytest.approx(courses["full"].losses[0], rel=1e-2)


def test_plain_loss_is_that_of_the_same_decisions_forced(
    job: Any, load: Callable[[], BaseModel], courses: dict[str, Any]
) -> None:
    """Gates as MindSkip decides them, loss as transformers computes it."""
    from mskip.compressor.encoding import Sample, collate
    from mskip.compressor.skipping import MindSkip

    base = load()
    numbers = job.batches()[0]
    samples = [Sample(*job.samples[number]) for number in numbers]
    batch = collate(samples, int(base.tokenizer.pad_token_id))
    labels = batch["input_ids"].clone()
    labels[batch["prompt_mask"] | ~batch["attention_mask"].bool()] = -100
    routers = tuning_contenders.first_routers(LAYERS, base.model.config.hidden_size, job.seed)
    with torch.no_grad(), MindSkip(base.model, routers):
        found = base.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            prompt_mask=batch["prompt_mask"],
            labels=labels,
            use_cache=False,
        )
    assert courses["plain"].losses[0] == pytest.approx(float(found.loss), rel=1e-5)


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_trains(
    job: Any,
    load: Callable[[], BaseModel],
    courses: dict[str, Any],
    name: str,
) -> None:
    """What it does to its parameters shows in later losses, not in the first; only full
    fine-tuning touches the backbone."""
    base = load()
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    rate = 1e-2 if name == "full" else 1.0
    course = tuning_contenders.TRAIN[name](job, base, rate)
    assert len(course.losses) == len(course.seconds) == job.steps
    assert course.seconds == sorted(course.seconds)
    assert course.losses[0] == pytest.approx(courses[name].losses[0], rel=1e-5)
    assert course.losses[1:] != pytest.approx(courses[name].losses[1:], rel=1e-3)
    same = all(torch.equal(before[key], value) for key, value in base.model.state_dict().items())
    assert same == (name != "full")


@pytest.mark.parametrize(
    ("name", "lowest"),
    [("ours", 1), ("plain", 0), ("plain-stopped", 1), ("plain-kl", 0), ("full", 0)],
)
def test_backward_goes_down_to(
    job: Any, load: Callable[[], BaseModel], name: str, lowest: int
) -> None:
    """Through every layer, or no further than the first routed one."""
    base = load()
    reached: list[int] = []

    def note(module: Any, args: Any, output: Tensor, layer: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: reached.append(layer))

    for index, layer in enumerate(base.model.model.layers):
        layer.register_forward_hook(lambda m, a, o, index=index: note(m, a, o, index))
    tuning_contenders.TRAIN[name](job, base, STILL)
    assert sorted(reached) == sorted(list(range(lowest, 4)) * job.steps)


# -- arithmetic -------------------------------------------------------------------------------


def shape_of(model: Any) -> Any:
    config = model.config
    return tuning_arithmetic.Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size,
        config.hidden_size * config.num_key_value_heads // config.num_attention_heads,
        config.vocab_size,
        tied=config.tie_word_embeddings,
        upper=config.num_hidden_layers - LAYERS[0],
        routed=len(LAYERS),
    )


def work_of(name: str) -> Any:
    """Of the two routed layers, the second's gates are shut: see `first_routers`."""
    work = tuning_arithmetic.WORK[name]
    return replace(work, shut=1.0) if name.startswith("ours") else work


@pytest.mark.parametrize("name", CONTENDERS)
def test_operations_are_those_that_pytorch_counts(
    job: Any, load: Callable[[], BaseModel], name: str
) -> None:
    """Matrix products without the attention's scores; nothing is padded, so nothing is extra."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = 0

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal counted
            result = op(*args, **(kwargs or {}))
            if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left = args[-2]
                counted += 2 * result.numel() * left.shape[1]
            return result

    base = load()
    samples = [(list(range(4 + row, 20 + row)), 10) for row in range(6)]
    even = replace(job, samples=samples)
    with Products():
        tuning_contenders.TRAIN[name](even, base, STILL)
    shape = shape_of(base.model)
    tokens, answers = 6 * 16, 6 / 16  # an epoch's; two epochs are run
    works = ["ours, first epoch", "ours, later"] if name == "ours" else [name, name]
    expected = sum(
        tokens * tuning_arithmetic.flops_per_token(shape, work_of(work), 0, answers)
        for work in works
    )
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", CONTENDERS)
def test_kept_bytes_are_those_that_autograd_keeps(
    tiny_model: Callable[..., Any], load: Callable[[], BaseModel], name: str
) -> None:
    from mskip.compressor.encoding import Sample, collate
    from mskip.compressor.loss import RelaxedPass
    from mskip.compressor.patching import patched
    from mskip.compressor.segments import SplitModel

    wide = tiny_model(hidden_size=64, intermediate_size=160)
    base = replace(load(), model=wide)
    model = base.model.requires_grad_(name == "full")
    batch = collate([Sample([5] * 40, 20), Sample([6] * 30, 20)], 0)
    routers = tuning_contenders.first_routers(LAYERS, 64, 0).requires_grad_(True)
    linears = [torch.nn.Linear(64, 1) for _ in LAYERS]
    inputs = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    def run() -> Tensor:
        if name == "ours":
            split = SplitModel(model, LAYERS[0])
            stem = split.stem(*inputs)
            with patched(model, LAYERS):
                return split.finish(stem, RelaxedPass(routers, batch["prompt_mask"], 1.0, None))
        through = name in ("plain", "plain-kl")
        embedded = model.get_input_embeddings()(inputs[0])
        embedded = embedded.requires_grad_() if through else embedded
        gates = tuning_contenders.plain_gates(base, LAYERS, linears, batch["prompt_mask"])
        body = {"attention_mask": inputs[1], "position_ids": inputs[2], "use_cache": False}
        if name == "full":
            return model.model(inputs_embeds=embedded, **body).last_hidden_state
        with gates:
            return model.model(inputs_embeds=embedded, **body).last_hidden_state

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = run()
    assert result.requires_grad
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    found = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in weights)
    work = work_of("ours, first epoch" if name == "ours" else name)
    per_token = tuning_arithmetic.kept_bytes_per_token(shape_of(model), work, 40, 4)
    # The final norm, the tables of the rotary embedding and one number a norm are left out.
    assert 0 <= found / (2 * 40 * per_token) - 1 < 0.08


def test_the_8b_has_its_parameters() -> None:
    assert tuning_arithmetic.LLAMA_8B.parameters == pytest.approx(8.03e9, rel=1e-3)


def test_rates_by_epoch(job: Any) -> None:
    """Twice as fast from the second epoch on: three epochs take two of the first."""
    tokens = sum(len(ids) for ids, _ in job.samples)
    rates = tuning_cost.rates_of(job, [3.0, 4.0, 5.0, 6.0], epochs=3.0)
    assert rates == pytest.approx(
        {"all": tokens / 3, "first": tokens / 4, "later": tokens / 2, "epochs": tokens * 3 / 8}
    )
    short = tuning_cost.rates_of(replace(job, steps=2), [3.0, 4.0], epochs=3.0)
    assert short == pytest.approx({"all": tokens / 4, "first": tokens / 4})


def test_ratios_are_taken_within_a_round() -> None:
    found = tuning_cost.ratio_and_spread([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])
    assert found == pytest.approx({"ratio": 2.0, "spread": 0.25})
    assert tuning_cost.ratio_and_spread([3.0], [2.0]) == {"ratio": 1.5, "spread": None}


# -- the report -------------------------------------------------------------------------------


def test_report_of_all_contenders(
    job: Any, load: Callable[[], BaseModel], courses: dict[str, Any]
) -> None:
    """Every contender has its row, here and for the 8B, within 80 columns."""
    resident = {"libraries_bytes": 10**8, "loaded_bytes": 2 * 10**8, "peak_bytes": 3 * 10**8}
    rounds = {name: [{**vars(course), **resident}] * 2 for name, course in courses.items()}
    options = tuning_cost.parse(["--model", job.model])
    report = tuning_cost.report_of(options, job, shape_of(load().model), rounds)
    names = [row["contender"] for row in report["rows"]]
    assert names == [*list(tuning_arithmetic.WORK)[:2], "ours, 3 epochs", *CONTENDERS[1:]]
    assert list(report["extrapolated"]["rows"]) == list(tuning_arithmetic.WORK)
    plain = report["extrapolated"]["rows"]["plain"]
    assert plain["minutes_as_measured"] == pytest.approx(plain["minutes"])
    assert report["rows"][3]["to_plain"] == {"ratio": 1.0, "spread": 0.0}
    assert report["same_loss"]["agree"]
    text = tuning_cost.table(report)
    assert "EXTRAPOLATED, not measured" in text
    assert max(map(len, text.splitlines())) <= 80


def test_script_runs_every_contender_in_a_process_of_its_own(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = [
        {"instruction": f"question {number}", "output": "the answer is " + "one two " * number}
        for number in range(1, 5)
    ]
    data, output = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    status = tuning_cost.main(
        [
            *("--model", str(tiny_folder), "--data", str(data), "--output", str(output)),
            *("--samples", "4", "--batch-size", "2", "--last", "2", "--repeats", "1"),
            *("--threads", "1", "--contenders", "ours", "plain-kl"),
        ]
    )
    assert status == 0
    assert "agree" in capsys.readouterr().out
    text = output.read_text("utf-8")
    assert str(tmp_path) not in text
    assert str(tiny_folder.parent) not in text
    report = json.loads(text)
    assert report["settings"]["steps"] == 6
    assert report["same_loss"]["relative_difference"] <= 1e-4
    for name in ("ours", "plain-kl"):
        (result,) = report["rounds"][name]
        assert len(result["seconds"]) == 6
        assert 0 < result["libraries_bytes"] < result["peak_bytes"]


def test_a_measurement_that_was_cut_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]
) -> None:
    prepared = {
        "layers": [1, 2],
        "samples": [([1, 2, 3], 2)] * 2,
        "shape": asdict(shape_of(tiny_model())),
    }
    trained: list[str] = []

    def process(name: str, _: Any) -> dict[str, Any]:
        if name == "prepare":
            return prepared
        if len(trained) == 3 and not (tmp_path / "cut").exists():
            (tmp_path / "cut").touch()
            raise KeyboardInterrupt
        trained.append(name)
        sizes = {"peak_bytes": 3, "libraries_bytes": 1, "loaded_bytes": 2}
        return {"seconds": [1.0, 2.0], "losses": [0.5, 0.5], **sizes}

    monkeypatch.setattr(tuning_cost, "_in_process", process)
    output = tmp_path / "report.json"
    options = ["--contenders", "ours", "plain-kl", "--repeats", "2", "--steps", "2"]
    with pytest.raises(KeyboardInterrupt):
        tuning_cost.main([*options, "--output", str(output)])
    assert not output.exists()
    assert tuning_cost.main([*options, "--output", str(output)]) == 0
    assert trained == ["ours", "plain-kl", "plain-kl", "ours"]
    assert [path.name for path in tmp_path.glob("*.json")] == ["report.json"]


def test_a_fault_of_the_user_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, result = tmp_path / "given.json", tmp_path / "result.json"
    options = vars(tuning_cost.parse(["--model", str(tmp_path / "nothing")]))
    given.write_text(json.dumps(options), "utf-8")
    assert tuning_cost._worker("prepare", str(given), str(result)) == 1
    printed = capsys.readouterr().err
    assert "does not exist" in printed
    assert "Traceback" not in printed
    assert not result.exists()
