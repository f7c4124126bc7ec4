"""The same dense model through other people's engines, beside both forms of our graph.

    python benchmarks/peers.py RUN --genai FOLDER --optimum FOLDER --output results/peers.json

RUN is exported in both forms (`mskip export`, `mskip export --target ort`). FOLDER is what
onnxruntime-genai's model builder made of the same base model, in the same precision and with
the logits of the last position alone:

    python -m onnxruntime_genai.models.builder -i MODEL -o FOLDER -p fp32 -e cpu -c CACHE \
        --extra_options prune_lm_head=true

The other folder is what optimum-onnx exported, in an environment of its own (it needs an older
transformers than mskip):

    optimum-cli export onnx -m MODEL --task text-generation-with-past FOLDER

Both run on the ONNX Runtime that mskip uses, the first with keys and values bound in place. Its
logits are of the last position alone, optimum's of all, as its export has it. Hugging Face
transformers runs the model in PyTorch, eager and sdpa. What is not given is named as not run.
With `--weights int8 int4` our graphs with rounded weights (`mskip export --target ort --weights
int8`) run beside.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from turns import PHASES, Times, no_times, ratio, shown, take_turns

from mskip.compressor.artifact import Run, open_run, versions
from mskip.compressor.files import write_json
from mskip.compressor.models import load_base
from mskip.exporters.contract import CONTRACT
from mskip.exporters.laziness import filled
from mskip.exporters.onnx_export import DENSE
from mskip.exporters.opening import open_runner
from mskip.exporters.quantised import BITS
from mskip.exporters.runner import Floats, Ints
from mskip.exporters.speed import machine
from mskip.exporters.targets import PORTABLE, Form

Step = Callable[[Ints], Floats]
Prefill = Callable[[Ints], tuple[Floats, Step]]
"""Reads a prompt [1, sequence]; gives the last position's logits, and a step that goes on by one
token [1, 1], always from the full prompt."""

BASE = "onnxruntime-genai"
ATTENTION = ["sdpa", "eager"]


def ours(run: Run, form: Form, threads: int | None) -> Prefill:
    """Our dense graph."""
    engine = open_runner(form.exported(run), DENSE, threads=threads)

    def prefill(ids: Ints) -> tuple[Floats, Step]:
        state = engine.prefill(ids, last_only=True)

        def step(token: Ints) -> Floats:
            return engine.extend(state, token).logits[:, -1]

        return state.logits[:, -1], step

    return prefill


def _session(folder: Path, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as in `OrtRunner`
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def optimum(folder: Path, threads: int | None) -> Prefill:
    """The graph that optimum-onnx exported; its keys and values grow by a copy."""
    import onnxruntime

    session = _session(folder, threads)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past = [(i.name, i.shape) for i in session.get_inputs() if i.name.startswith("past")]
    outputs = [each.name for each in session.get_outputs()]

    def call(tokens: Ints, cache: list[Any]) -> tuple[Floats, list[Any]]:
        new, before = tokens.shape[1], cache[0].shape()[2]
        feeds = {
            "input_ids": value(tokens),
            "attention_mask": value(np.ones((1, before + new), np.int64)),
            "position_ids": value(np.arange(before, before + new)[None]),
            **dict(zip((name for name, _ in past), cache, strict=True)),
        }
        logits, *present = session.run_with_ort_values(outputs, feeds)
        found: Floats = logits.numpy()[:, -1]
        return found, present

    def prefill(ids: Ints) -> tuple[Floats, Step]:
        nothing = np.zeros((1, past[0][1][1], 0, past[0][1][3]), np.float32)
        first, cache = call(ids, [value(nothing) for _ in past])
        return first, lambda token: call(token, cache)[0]

    return prefill


def genai(folder: Path, threads: int | None) -> Prefill:
    """The graph of onnxruntime-genai's builder."""
    import onnxruntime

    session = _session(folder, threads)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past = [(i.name, i.shape) for i in session.get_inputs() if i.name.startswith("past")]

    def prefill(ids: Ints) -> tuple[Floats, Step]:
        length = ids.shape[1]
        heads, width = past[0][1][1], _width(folder)
        arrays = [np.zeros((1, heads, length + 64, width), np.float32) for _ in past]
        buffers = [value(array) for array in arrays]

        def call(tokens: Ints, total: int) -> Floats:
            binding = session.io_binding()
            feeds = {"input_ids": tokens, "attention_mask": np.ones((1, total), np.int64)}
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, value(array))
            for (name, _), buffer in zip(past, buffers, strict=True):
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
            binding.bind_output("logits", "cpu")
            session.run_with_iobinding(binding)
            logits: Floats = binding.get_outputs()[-1].numpy()[:, -1]
            assert arrays  # the buffers borrow their memory
            return logits

        return call(ids, length), lambda token: call(token, length + 1)

    return prefill


def _width(folder: Path) -> int:
    decoder = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    return int(decoder["head_size"])


def hugging_face(model: PreTrainedModel, attention: str) -> Prefill:
    """transformers in PyTorch, on weights that are shared with the model handed in."""
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    model.set_attn_implementation(attention)

    @torch.inference_mode()
    def prefill(ids: Ints) -> tuple[Floats, Step]:
        cache = DynamicCache(config=model.config)
        first = model(torch.from_numpy(ids), past_key_values=cache, logits_to_keep=1)

        @torch.inference_mode()
        def step(token: Ints) -> Floats:
            after = model(torch.from_numpy(token), past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)  # the next step starts from the prompt again
            found: Floats = after.logits[:, -1].numpy()
            return found

        return first.logits[:, -1].numpy(), step

    return prefill


def check(contenders: dict[str, Prefill], ids: Ints) -> None:
    """Everybody computes the same logits, of the prompt and of a step after it.

    Raises:
        ValueError: a contender computes something else.
    """
    expected: dict[str, Floats] = {}
    for name, prefill in contenders.items():
        logits, step = prefill(ids)
        _compare(name, "prefill", logits, expected)
        _compare(name, "decode", step(ids[:, :1]), expected)


def _in_turn(prefill: Prefill, ids: Ints) -> Callable[[], Callable[[], object]]:
    def read() -> Callable[[], object]:
        _, step = prefill(ids)
        return lambda: step(ids[:, :1])

    return read


def _compare(name: str, phase: str, logits: Floats, expected: dict[str, Floats]) -> None:
    if any(weights in name for weights in BITS):
        return  # rounded weights: `mskip validate` judges them
    if np.abs(logits - expected.setdefault(phase, logits)).max() > 1e-2:
        raise ValueError(f"{name} computes other logits in {phase} than the first that ran.")


def rows_of(times: Times, context: int, base: str) -> list[dict[str, Any]]:
    """A row a phase and contender; the ratio to ``base`` is taken within a turn, see turns.py."""
    return [
        {
            "context": context,
            "phase": phase,
            "engine": name,
            "ms": round(statistics.median(taken), 2),
            "to": base,
            "ratio": ratio(taken, times[phase][base]),
            "all_ms": [round(value, 2) for value in taken],
        }
        for phase in PHASES
        for name, taken in times[phase].items()
    ]


def opened(
    run: Run, model: PreTrainedModel, given: argparse.Namespace
) -> tuple[dict[str, Prefill], dict[str, str]]:
    """Sessions that nobody has used, and of the others why they do not run."""
    contenders: dict[str, Prefill] = {}
    not_run = {}
    for name, folder, make in (
        (BASE, given.genai, genai),
        ("optimum-onnx", given.optimum, optimum),
    ):
        if folder is None:
            not_run[name] = f"no --{make.__name__} FOLDER was given"
        else:
            contenders[name] = make(folder, given.threads)
    contenders["mskip, target ort"] = ours(run, Form("ort"), given.threads)
    for weights in given.weights:
        contenders[f"mskip, {weights}"] = ours(run, Form("ort", weights), given.threads)
    if not (PORTABLE.folder(run) / CONTRACT).is_file():
        not_run["mskip, portable"] = f"not exported ({PORTABLE.export_command})"
    elif given.portable:
        contenders["mskip, portable"] = ours(run, PORTABLE, given.threads)
    for attention in given.attention:
        contenders[f"transformers, {attention}"] = hugging_face(model, attention)
    return contenders, not_run


def timed(run: Run, model: PreTrainedModel, ids: Ints, given: argparse.Namespace) -> Times:
    """Of everybody, opened anew for every start: where the weights came to lie is luck."""
    times: Times = {}
    for start in range(given.starts):
        contenders, _ = opened(run, model, given)
        times = times or no_times(contenders)
        check(contenders, ids)
        readers = {name: _in_turn(prefill, ids) for name, prefill in contenders.items()}
        take_turns(readers, times, rounds=given.rounds, steps=given.steps, seed=start)
    return times


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--optimum", type=Path)
    parser.add_argument("--context", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="of each start")
    parser.add_argument("--steps", type=int, default=16, help="after each prefill")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--weights", choices=list(BITS), nargs="*", default=[])
    parser.add_argument("--attention", choices=ATTENTION, nargs="*", default=ATTENTION)
    parser.add_argument("--portable", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run = open_run(given.run)
    base = load_base(run.recipe().model)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    _, not_run = opened(run, base.model, given)
    prompt = base.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    rows: list[dict[str, Any]] = []
    print(f"{'context':>7}  {'phase':7}  {'engine':20}  {'ms':>9}  ratio")
    for context in given.context:
        times = timed(run, base.model, filled([prompt], context), given)
        for row in rows_of(times, context, next(iter(times["prefill"]))):
            rows.append(row)
            print(
                f"{row['context']:7}  {row['phase']:7}  {row['engine']:20}  {row['ms']:9.2f}  "
                f"{shown(row['ratio'])}",
                flush=True,
            )
    for name, reason in not_run.items():
        print(f"not run: {name}: {reason}")
    import onnxruntime

    report = {
        "rows": rows,
        "not_run": not_run,
        "model": run.recipe().model.name,
        "machine": machine(f"onnxruntime {onnxruntime.__version__}", given.threads),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(given.output, report)


if __name__ == "__main__":
    main()
