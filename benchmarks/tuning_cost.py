"""What tuning costs: tokens per second and peak memory against what else could be done.

    python benchmarks/tuning_cost.py --samples 32 --repeats 3 \\
        --output benchmarks/results/FILE.json

Every contender has the same model, samples, batches in the same order, number of optimiser
steps and threads, in float32, and a process of its own; the processes take turns.

ours           `mskip.compressor.tuning.tune`, Trainer and checkpoints included.
plain          The public recipe as its paper describes it (arXiv 2410.13184), written anew: the
               whole model forward with a hard straight-through gate behind every routed attention,
               logits of every position, next-token loss on the answers, frozen backbone.
               Assumed: the embeddings' output requires a gradient, as it does wherever gradient
               checkpointing has been prepared for; so backward runs through every layer.
plain-stopped  The same without that assumption: autograd ends at the first routed layer by itself.
plain-kl       plain with our loss, so with a dense forward of the whole model for the teacher.
full           All parameters, AdamW, next-token loss.

Not timed, for any of them: loading, encoding, writing answers, one warm-up step, and where the
routers start (`mskip tune` measures sensitivities for it). The routers pool over the prompt, not
over the padded sequence as the public code does, so that all begin with the same gates; it costs
the same. Peak memory is the largest resident size from warm-up on, less that of a process that
has trained a toy with the same libraries. Tokens are real tokens, never padding.

The column "formula" is the same peak by arithmetic, which the extrapolation to 8B rests on. It
lacks what malloc holds back: with MALLOC_MMAP_THRESHOLD_=65536, which returns every block and
makes the times worthless, the two came within 0.02 GB on a random model of 2.5 M parameters.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tuning_arithmetic import (
    WORK,
    Shape,
    extrapolate,
    peak_bytes,
    store_bytes,
)
from tuning_contenders import TRAIN, Job

from mskip.compressor.errors import MskipError
from mskip.compressor.files import read_json, write_json
from mskip.compressor.models import load_base
from mskip.compressor.recipe import DataSpec, ModelSpec, Recipe, RoutingSpec, TuningSpec
from mskip.compressor.samples import read_samples

LEARNING_RATE = 1e-5  # of the public code; what is learned is not the question here
SAME_LOSS = 1e-4  # relative

# -- one process a contender ------------------------------------------------------------------


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def work_off(name: str, job: Job) -> dict[str, Any]:
    """Train one contender in this process.

    Returns:
        Its `Course`, and resident bytes: of the libraries, with the model loaded, at the peak.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    # An optimiser's first step imports more than the model takes; it is no part of tuning.
    toy = nn.Linear(4, 1)
    toy(torch.ones(1, 4)).backward()
    torch.optim.AdamW(toy.parameters()).step()
    libraries = _resident("VmRSS")
    base = load_base(ModelSpec(name=job.model))
    loaded = _resident("VmRSS")
    with suppress(OSError):  # Loading has a peak of its own.
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    train = TRAIN[name]
    numbers = job.batches()[0]
    warm = Job(
        job.model, job.layers, [job.samples[number] for number in numbers], job.batch_size, 1
    )
    train(warm, base, 1e-12)
    course = train(job, base, LEARNING_RATE)
    resident = {"libraries_bytes": libraries, "loaded_bytes": loaded}
    return {**asdict(course), **resident, "peak_bytes": _resident("VmHWM")}


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """Samples with answers, routed layers and shape; the model is loaded and left again."""
    recipe = Recipe(
        name="tuning-cost",
        model=ModelSpec(name=options["model"]),
        routing=RoutingSpec(last=options["last"]),
        tuning=TuningSpec(max_length=options["max_length"]),
        data=DataSpec(source=options["data"]),
    )
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    base = load_base(recipe.model)
    config = base.model.config
    layers = recipe.routing.routed_layers(config.num_hidden_layers)
    samples = read_samples(options["data"], recipe, base, options["samples"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size,
        config.num_attention_heads * head, config.num_key_value_heads * head,
        config.vocab_size, bool(config.tie_word_embeddings),
        config.num_hidden_layers - layers[0], len(layers),
    )  # fmt: skip
    return {
        "layers": layers,
        "samples": [(sample.input_ids, sample.prompt_length) for sample in samples],
        "shape": asdict(shape),
    }


def _worker(name: str, given: str, result: str) -> int:
    value = json.loads(Path(given).read_text("utf-8"))
    try:
        outcome = prepare(value) if name == "prepare" else work_off(name, Job(**value))
    except MskipError as error:
        print(error, file=sys.stderr)
        return error.status
    write_json(Path(result), outcome)
    return 0


def _in_process(name: str, value: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "given.json"), Path(folder, "result.json")
        write_json(given, value)
        command = [sys.executable, __file__, "--worker", name, str(given), str(result)]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise SystemExit(f"{name} ended with status {status}; see above.")
        outcome: dict[str, Any] = read_json(result, f"result of {name}")
        return outcome


# -- figures ----------------------------------------------------------------------------------


def rates_of(job: Job, seconds: list[float], epochs: float) -> dict[str, float]:
    """Tokens a second: over all steps, in the first epoch, in later ones, over ``epochs`` epochs.

    The last is put together from the two before; both need more steps than one epoch has.
    """
    tokens = [sum(len(job.samples[number][0]) for number in batch) for batch in job.batches()]
    first = min(job.steps_per_epoch, job.steps)
    rates = {
        "all": sum(tokens) / seconds[-1],
        "first": sum(tokens[:first]) / seconds[first - 1],
    }
    if job.steps > first:
        rates["later"] = sum(tokens[first:]) / (seconds[-1] - seconds[first - 1])
        rates["epochs"] = epochs / (1 / rates["first"] + (epochs - 1) / rates["later"])
    return rates


def ratio_and_spread(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """Median of the ratios within each round, and half their range over it (None of one round)."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    median = statistics.median(ratios)
    spread = (max(ratios) - min(ratios)) / 2 / median if len(ratios) > 1 else None
    return {"ratio": median, "spread": spread}


def figures(job: Job, shape: Shape, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows of the table, and whether the losses agree, from the rounds of every contender."""
    epochs = TuningSpec().epochs
    series: dict[str, list[float]] = {}
    for name, results in rounds.items():
        rates = [rates_of(job, result["seconds"], epochs) for result in results]
        if name != "ours":
            series[name] = [rate["all"] for rate in rates]
            continue
        labels = {"first": "first epoch", "later": "later", "epochs": f"{epochs:g} epochs"}
        for key in labels.keys() & rates[0].keys():
            series[f"ours, {labels[key]}"] = [rate[key] for rate in rates]
    batches = [[job.samples[number] for number in batch] for batch in job.batches()]
    sizes = [(len(b), max(len(i) for i, _ in b), sum(len(i) - p for i, p in b)) for b in batches]
    kept = sum(store_bytes(shape, len(i), len(i) - p, 4) for i, p in job.samples)
    rows = []
    for name in sorted(series, key=_ORDER.index):
        contender = name.partition(",")[0]
        results = rounds[contender]
        work = WORK["ours, first epoch" if contender == "ours" else contender]
        predicted = max(peak_bytes(shape, work, *size, 4) for size in sizes)
        row: dict[str, Any] = {
            "contender": name,
            "tokens_per_second": statistics.median(series[name]),
            "peak_bytes": statistics.median(
                r["peak_bytes"] - r["libraries_bytes"] for r in results
            ),
            "predicted_bytes": predicted + (kept if contender == "ours" else 0),
        }
        for other in ("plain", "plain-kl"):
            if other in series:
                row[f"to_{other}"] = ratio_and_spread(series[name], series[other])
        rows.append(row)
    pair = [name for name in ("ours", "plain-kl") if name in rounds]
    losses: dict[str, float] = {name: rounds[name][0]["losses"][0] for name in pair}
    same: dict[str, Any] | None = None
    if len(losses) == 2:
        difference = abs(losses["ours"] / losses["plain-kl"] - 1)
        same = {**losses, "relative_difference": difference, "agree": difference <= SAME_LOSS}
    return {"rows": rows, "same_loss": same}


_ORDER = [
    "ours, first epoch", "ours, later", f"ours, {TuningSpec().epochs:g} epochs",
    "plain", "plain-stopped", "plain-kl", "full",
]  # fmt: skip

# -- report -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, and let the contenders take turns."""
    keys = ("model", "data", "samples", "max_length", "last", "threads")
    prepared = _in_process("prepare", {key: getattr(options, key) for key in keys})
    shape, samples = Shape(**prepared["shape"]), prepared["samples"]
    epoch = math.ceil(len(samples) / options.batch_size)
    steps = options.steps or math.ceil(epoch * TuningSpec().epochs)
    job = Job(
        options.model, prepared["layers"], samples, options.batch_size, steps,
        options.seed, options.threads,
    )  # fmt: skip
    kept = _kept(options)
    rounds = _kept_rounds(kept, options, job)
    order = list(options.contenders)
    for repeat in range(options.repeats):
        for name in order:
            if len(rounds[name]) > repeat:
                continue
            print(f"round {repeat + 1} of {options.repeats}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(_in_process(name, asdict(job)))
            if kept is not None:
                write_json(kept, {"job": asdict(job), "rounds": rounds})
        # Another one goes first each round: nobody always runs after the slowest.
        order = order[1:] + order[:1]
    return report_of(options, job, shape, rounds)


def _kept(options: argparse.Namespace) -> Path | None:
    """Where the rounds lie until there is a report."""
    return None if options.output is None else options.output.with_suffix(".rounds.json")


def _kept_rounds(
    kept: Path | None, options: argparse.Namespace, job: Job
) -> dict[str, list[dict[str, Any]]]:
    """What a measurement of the same job that was cut short has left, by contender."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    if kept is None or not kept.is_file():
        return rounds
    found = read_json(kept, "kept rounds")
    if found["job"] == json.loads(json.dumps(asdict(job))):
        rounds |= {name: found["rounds"].get(name, []) for name in rounds}
    return rounds


def report_of(
    options: argparse.Namespace, job: Job, shape: Shape, rounds: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The report of what `work_off` gave in every round, by contender."""
    from mskip.exporters.speed import machine

    samples = job.samples
    lengths = [len(ids) for ids, _ in samples]
    answers = [len(ids) - prompt for ids, prompt in samples]
    found = figures(job, shape, rounds)
    ratios = {
        row["contender"]: row["to_plain"]["ratio"] if "to_plain" in row else None
        for row in found["rows"]
        if row["contender"] in WORK
    }
    gpu = {"tflops": options.tflops, "utilisation": options.utilisation, "gb": options.gb}
    # What a token's attention costs goes by the length of its sequence.
    length = sum(value**2 for value in lengths) / sum(lengths)
    where = {**machine("", options.threads), "torch": torch.__version__}
    del where["onnxruntime"]
    return {
        "machine": where,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mskip", "torch", "transformers", "accelerate")},
        },
        "seeds": {"routers and order": options.seed},
        "settings": {
            # A folder or a file by its own name: where it lies says nothing.
            "model": Path(options.model).name,
            "data": Path(options.data).name,
            "routed_layers": job.layers,
            "parameters": shape.parameters,
            "samples": len(samples),
            "tokens": sum(lengths),
            "answer_tokens": sum(answers),
            "longest": max(lengths),
            "batch_size": job.batch_size,
            "steps": job.steps,
            "steps_per_epoch": job.steps_per_epoch,
            "repeats": options.repeats,
            "dtype": "float32",
        },
        **found,
        "extrapolated": extrapolate(shape, length, sum(answers) / sum(lengths), ratios, gpu),
        "rounds": rounds,
    }


def table(report: dict[str, Any]) -> str:
    """The report in plain text, at most 80 columns wide."""
    settings = report["settings"]
    spread = "half the range of the ratios within a round, over their median"
    lines = [
        f"{settings['model']}, {report['date']}, {report['machine']['cores']} cores, "
        f"{settings['dtype']}",
        f"{settings['samples']} samples, {settings['tokens']} tokens "
        f"({settings['answer_tokens']} answers), batch {settings['batch_size']}, "
        f"{settings['steps']} steps ({settings['steps_per_epoch']} an epoch)",
        "",
        f"{'':20}{'tokens/s':>9}{'to plain':>16}{'to plain-kl':>16}{'peak GB':>9}{'formula':>9}",
    ]
    for row in report["rows"]:
        ratios = "".join(_ratio(row.get(key)) for key in ("to_plain", "to_plain-kl"))
        sizes = f"{row['peak_bytes'] / 1e9:9.2f}{row['predicted_bytes'] / 1e9:9.2f}"
        lines.append(f"{row['contender']:20}{row['tokens_per_second']:9.1f}{ratios}{sizes}")
    lines += ["", f"+-: {spread}; {settings['repeats']} rounds"]
    if same := report["same_loss"]:
        verdict = "agree" if same["agree"] else "DO NOT AGREE"
        lines.append(
            f"first batch, same gates: loss of ours {same['ours']:.7g}, of plain-kl "
            f"{same['plain-kl']:.7g}: {verdict}"
        )
    return "\n".join([*lines, "", *_extrapolated_lines(report["extrapolated"])])


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return f"{'-':>16}"
    spread = "" if found["spread"] is None else f" +- {found['spread']:.0%}"
    return f"{found['ratio']:.2f}{spread}".rjust(16)


def _extrapolated_lines(found: dict[str, Any]) -> list[str]:
    given = found["assumptions"]
    lines = [
        "EXTRAPOLATED, not measured: Llama 8B, bfloat16, 16 of 32 layers routed,",
        f"{given['samples']} samples of {given['length']} tokens, one sequence a forward pass, "
        f"{given['answer_share']:.0%} answers,",
        f"a GPU of {given['tflops']:g} TFLOP/s of which {given['utilisation']:.0%} are reached, "
        f"{given['gb']:g} GB",
        "",
        f"{'':20}{'GB':>7}{'fits':>6}{'min/epoch':>11}{'as measured':>13}",
    ]
    for name, row in found["rows"].items():
        measured = row["minutes_as_measured"]
        lines.append(
            f"{name:20}{row['bytes'] / 1e9:7.1f}{'yes' if row['fits'] else 'no':>6}"
            f"{row['minutes']:11.1f}{'-' if measured is None else f'{measured:.1f}':>13}"
        )
    return [
        *lines,
        "",
        "GB: weights, what autograd keeps, logits; as the column 'formula' above.",
        "min/epoch: operations by arithmetic, everybody at that utilisation; as measured:",
        "plain at it, and the others' FLOP/s in the ratio to plain's that was found here.",
        f"'ours, later' holds {found['store_bytes'] / 1e9:.1f} GB more; with "
        f"tuning.cache_gib at its {given['cache_gib_default']:g} GiB only",
        f"{found['stored_by_default']:.0%} of the samples are held, and the others cost what they "
        "cost at first.",
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokens a second and peak memory of tuning, against the plain recipe and "
        "full fine-tuning."
    )
    add = parser.add_argument
    add("--model", default="embedded:smollm2-135m", help="as in a recipe [%(default)s]")
    add("--data", default="embedded:prompts", help="as in a recipe [%(default)s]")
    add("--samples", type=int, default=32, help="conversations to read [%(default)s]")
    add("--batch-size", type=int, default=8, help="sequences a step [%(default)s]")
    add("--max-length", type=int, default=512, help="tokens a sequence [%(default)s]")
    add("--last", type=int, default=16, help="routed layers before the last one [%(default)s]")
    add("--steps", type=int, help="optimiser steps [the recipe's default epochs]")
    add("--repeats", type=int, default=3, help="rounds [%(default)s]")
    add("--seed", type=int, default=0, help="of routers and order [%(default)s]")
    add("--threads", type=int, help="of torch [its own choice]")
    add("--contenders", nargs="+", choices=list(TRAIN), default=list(TRAIN), help="[all]")
    add("--tflops", type=float, default=312.0, help="of the GPU, bfloat16 [%(default)s]")
    add("--utilisation", type=float, default=0.4, help="share of it reached [%(default)s]")
    add("--gb", type=float, default=80.0, help="memory of the GPU [%(default)s]")
    add("--output", type=Path, help="write the report there, JSON")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/status").is_file():
        parser.error("peak memory is read from /proc/self/status, which this system has not")
    if min(options.samples, options.batch_size, options.repeats, options.steps or 1) < 1:
        parser.error("--samples, --batch-size, --steps and --repeats are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0; 3 where the losses that must agree do not."""
    options = parse(arguments)
    report = measure(options)
    print(table(report))
    if options.output is not None:
        write_json(options.output, report)
        options.output.with_suffix(".rounds.json").unlink(missing_ok=True)
    same = report["same_loss"]
    return 3 if same and not same["agree"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(_worker(*sys.argv[2:]))
    sys.exit(main())
