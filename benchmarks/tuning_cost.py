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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mskip.compressor.encoding import Batch, Sample, collate
from mskip.compressor.errors import MskipError
from mskip.compressor.families import family_of
from mskip.compressor.files import read_json, write_json
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.recipe import DataSpec, ModelSpec, Recipe, RoutingSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.rowwise import ROWS
from mskip.compressor.samples import read_samples
from mskip.compressor.sampling import GroupedByLength
from mskip.compressor.tuning import tune

CAPACITY = 0.5
LEARNING_RATE = 1e-5  # of the public code; what is learned is not the question here
SAME_LOSS = 1e-4  # relative

# -- what every contender is given ------------------------------------------------------------


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

# -- arithmetic: operations and bytes of the same contenders ----------------------------------


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; ``attention`` and ``kv`` are widths over all heads, ``upper`` counts the
    layers from the first routed one on."""

    layers: int
    hidden: int
    intermediate: int
    attention: int
    kv: int
    vocabulary: int
    tied: bool
    upper: int
    routed: int

    @property
    def layer_parameters(self) -> int:
        return self.hidden * (2 * self.attention + 2 * self.kv + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """Without the norms."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + tables


LLAMA_8B = Shape(32, 4096, 14336, 4096, 1024, 128256, tied=False, upper=17, routed=16)


@dataclass(frozen=True)
class Work:
    """What one token takes.

    Attributes:
        lower: times each layer below the first routed one is computed forward, differentiated
            for its input, and differentiated for its weights.
        upper: the same from the first routed layer on.
        head: passes of the head's matrix, differentiation included.
        everywhere: the head is at every position, not at answers alone.
        gates: tensors of the hidden state's size that a gate keeps for backward.
        logits: bytes held at once for one entry of the vocabulary, from the tokens of a
            batch, its answer tokens and the bytes of an element.
    """

    lower: tuple[int, int, int]
    upper: tuple[int, int, int]
    head: int
    everywhere: bool
    gates: int
    logits: Callable[[int, int, int], int]


def _lm_logits(tokens: int, answers: int, element: int) -> int:
    return 12 * tokens  # log probabilities and two gradients of them, float32


def _kl_logits(tokens: int, answers: int, element: int) -> int:
    return 2 * element * tokens + (2 * element + 16) * answers


def _row_logits(tokens: int, answers: int, element: int) -> int:
    return 36 * min(ROWS, answers)  # six float32 tables, and three as gradients


WORK = {
    "ours, first epoch": Work((1, 0, 0), (2, 1, 0), 3, False, 2, _row_logits),
    "ours, later": Work((0, 0, 0), (1, 1, 0), 3, False, 2, _row_logits),
    "plain": Work((1, 1, 0), (1, 1, 0), 2, True, 1, _lm_logits),
    "plain-stopped": Work((1, 0, 0), (1, 1, 0), 2, True, 1, _lm_logits),
    "plain-kl": Work((2, 1, 0), (2, 1, 0), 3, True, 1, _kl_logits),
    "full": Work((1, 1, 1), (1, 1, 1), 3, True, 0, _lm_logits),
}


def flops_per_token(shape: Shape, work: Work, length: float, answers: float) -> float:
    """Floating-point operations a token, causal attention counted at half its square.

    Args:
        shape: of the model.
        work: of the contender.
        length: tokens a sequence.
        answers: share of the tokens that are scored.
    """

    attention = 2 * shape.hidden * (2 * shape.attention + 2 * shape.kv)
    scores = 2 * shape.attention * length
    layer = 2 * shape.layer_parameters

    def layers(count: int, forward: int, inputs: int, weights: int) -> float:
        return count * (layer * (forward + inputs + weights) + scores * (forward + 2 * inputs))

    lower, upper = layers(shape.layers - shape.upper, *work.lower), layers(shape.upper, *work.upper)
    if not work.lower[1]:  # See `kept_bytes_per_token`.
        upper -= work.upper[1] * (attention + 2 * scores)
    share = 1 if work.everywhere else answers
    return lower + upper + 2 * shape.hidden * shape.vocabulary * work.head * share


def kept_bytes_per_token(shape: Shape, work: Work, length: int, element: int) -> int:
    """What autograd keeps for backward, bytes a token of a batch padded to ``length``.

    A layer keeps both norms' inputs in float32; queries, keys and values (repeated to all
    heads), the attention's output and the mask's row; of the MLP the gate before and after its
    activation, and the other factor. Weights that are trained also need their inputs. The
    attention of the first routed layer is not differentiated where the layers below are not.
    """
    attention = 4 * shape.hidden + element * (4 * shape.attention + length)
    mlp = 4 * shape.hidden + element * 3 * shape.intermediate
    trained = element * (4 * shape.hidden + shape.intermediate) if work.upper[2] else 0
    if work.lower[1]:
        kept = shape.layers * (attention + mlp + trained)
    else:
        kept = shape.upper * (attention + mlp) - attention
    return kept + work.gates * shape.routed * element * shape.hidden


def peak_bytes(
    shape: Shape, work: Work, batch: int, length: int, answers: int, element: int
) -> int:
    """Weights, what autograd keeps, and logits, at one time; without a store of activations.

    Args:
        shape: of the model.
        work: of the contender.
        batch: sequences.
        length: tokens each, padding included.
        answers: scored tokens of the batch.
        element: bytes of a weight and of an activation. Trained weights take 16 whatever it
            is: themselves, gradient and AdamW's two moments in float32, or a bfloat16 copy
            and gradient with master and moments in float32.
    """
    weights = shape.parameters * (16 if work.upper[2] else element)
    kept = batch * length * kept_bytes_per_token(shape, work, length, element)
    return weights + kept + shape.vocabulary * work.logits(batch * length, answers, element)


def store_bytes(shape: Shape, tokens: float, answers: float, element: int) -> float:
    """What `StemStore` holds of samples with so many tokens, ``answers`` of them scored."""
    return (tokens + answers) * shape.hidden * element


def extrapolate(
    measured: Shape, length: float, answers: float, ratios: dict[str, float | None],
    gpu: dict[str, float], samples: int = 1000, big_length: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """Memory and time of an 8B Llama, bfloat16, one sequence a forward pass. Not measured.

    Args:
        measured: shape of the model that was timed.
        length: mean length of the timed tokens' sequences.
        answers: share of the timed tokens that are scored; assumed of the 8B's data too.
        ratios: by row of `WORK`, measured tokens a second in those of plain; None: not known.
        gpu: ``tflops``, ``utilisation`` and ``gb``.
        samples: sequences an epoch.
        big_length: tokens each.

    Returns:
        ``rows`` by contender: ``bytes``, ``fits``, ``minutes`` of an epoch at the given
        utilisation for all, ``minutes_as_measured`` with that utilisation for plain and the
        others' FLOP/s in the measured ratio to plain's. Also the size of the store.
    """
    tokens = samples * big_length
    scored = round(answers * big_length)
    per_second = gpu["tflops"] * 1e12 * gpu["utilisation"]
    rows = {}
    for name, ratio in ratios.items():
        work = WORK[name]
        size = peak_bytes(LLAMA_8B, work, 1, big_length, scored, 2)
        minutes = tokens * flops_per_token(LLAMA_8B, work, big_length, answers) / per_second / 60
        here, plain = (flops_per_token(measured, w, length, answers) for w in (work, WORK["plain"]))
        rows[name] = {
            "bytes": size,
            "fits": size <= gpu["gb"] * 1e9,
            "minutes": minutes,
            "minutes_as_measured": None if ratio is None else minutes * plain / (ratio * here),
        }
    store = store_bytes(LLAMA_8B, tokens, answers * tokens, 2)
    default = TuningSpec().cache_gib
    return {
        "rows": rows,
        "store_bytes": store,
        "stored_by_default": min(1.0, default * 2**30 / store),
        "assumptions": {
            **gpu, "samples": samples, "length": big_length, "answer_share": answers,
            "cache_gib_default": default,
        },
    }  # fmt: skip


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
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    order = list(options.contenders)
    for repeat in range(options.repeats):
        for name in order:
            print(f"round {repeat + 1} of {options.repeats}: {name}", file=sys.stderr, flush=True)
            rounds[name].append(_in_process(name, asdict(job)))
        # Another one goes first each round: nobody always runs after the slowest.
        order = order[1:] + order[:1]
    return report_of(options, job, shape, rounds)


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
    same = report["same_loss"]
    return 3 if same and not same["agree"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(_worker(*sys.argv[2:]))
    sys.exit(main())
