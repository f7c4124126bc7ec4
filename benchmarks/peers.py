"""The same dense model through other people's engines, beside both forms of our graph.

    python benchmarks/peers.py RUN --genai FOLDER --output results/peers.json

RUN is exported in both forms (`mskip export`, `mskip export --target ort`). FOLDER is what
onnxruntime-genai's model builder made of the same base model, in the same precision and with
the logits of the last position alone, as all contenders here:

    python -m onnxruntime_genai.models.builder -i MODEL -o FOLDER -p fp32 -e cpu -c CACHE \
        --extra_options prune_lm_head=true

Its graph runs on the ONNX Runtime that mskip uses, keys and values bound in place. Hugging Face
transformers runs the model in PyTorch, eager and sdpa. What is not given is named as not run.
With `--weights int8 int4` our graphs with rounded weights (`mskip export --target ort --weights
int8`) run beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from mskip.compressor.artifact import Run, open_run, versions
from mskip.compressor.files import write_json
from mskip.compressor.models import load_base
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


def ours(run: Run, form: Form, threads: int | None) -> Prefill:
    """Our dense graph."""
    engine = open_runner(form.exported(run), DENSE, threads=threads)

    def prefill(ids: Ints) -> tuple[Floats, Step]:
        state = engine.prefill(ids, last_only=True)

        def step(token: Ints) -> Floats:
            return engine.extend(state, token).logits[:, -1]

        return state.logits[:, -1], step

    return prefill


def genai(folder: Path, threads: int | None) -> Prefill:
    """The graph of onnxruntime-genai's builder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
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
    """transformers in PyTorch."""

    @torch.inference_mode()
    def prefill(ids: Ints) -> tuple[Floats, Step]:
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
        first = model(torch.from_numpy(ids), past_key_values=cache, logits_to_keep=1)

        @torch.inference_mode()
        def step(token: Ints) -> Floats:
            model.set_attn_implementation(attention)
            after = model(torch.from_numpy(token), past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)  # the next step starts from the prompt again
            found: Floats = after.logits[:, -1].numpy()
            return found

        return first.logits[:, -1].numpy(), step

    return prefill


def measure(
    contenders: dict[str, Prefill], ids: Ints, repeats: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """ms by contender and phase; a token's in decoding. One round is not counted.

    Raises:
        ValueError: a contender computes something else.
    """
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in contenders
    }
    names = list(contenders)
    expected: dict[str, Floats] = {}
    for repeat in range(repeats + 1):
        names = names[1:] + names[:1]  # another one goes first each round
        for name in names:
            start = time.perf_counter()
            logits, step = contenders[name](ids)
            prefill = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(steps):
                after = step(ids[:, :1])
            decode = (time.perf_counter() - start) / steps
            del step
            for phase, found in (("prefill", logits), ("decode", after)):
                if any(weights in name for weights in BITS):
                    continue  # rounded weights: `mskip validate` judges them
                if np.abs(found - expected.setdefault(phase, found)).max() > 1e-2:
                    raise ValueError(f"{name} computes other logits in {phase} than {names[0]}.")
            if repeat:
                times[name]["prefill"].append(prefill * 1e3)
                times[name]["decode"].append(decode * 1e3)
    return times


def rows_of(
    times: dict[str, dict[str, list[float]]], context: int, base: str
) -> list[dict[str, Any]]:
    """A row a phase and contender; the ratio to ``base`` is taken within a round."""
    rows = []
    for phase in ("prefill", "decode"):
        for name, phases in times.items():
            ratios = [a / b for a, b in zip(phases[phase], times[base][phase], strict=True)]
            rows.append(
                {
                    "context": context,
                    "phase": phase,
                    "engine": name,
                    "ms": round(statistics.median(phases[phase]), 2),
                    "to": base,
                    "ratio": round(statistics.median(ratios), 3),
                    "spread": round((max(ratios) - min(ratios)) / 2, 3),
                    "repeats": len(ratios),
                }
            )
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--context", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--weights", choices=list(BITS), nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run = open_run(given.run)
    base = load_base(run.recipe().model)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    contenders: dict[str, Prefill] = {}
    not_run = {}
    if given.genai is None:
        not_run[BASE] = "no --genai FOLDER was given"
    else:
        contenders[BASE] = genai(given.genai, given.threads)
    contenders["mskip, target ort"] = ours(run, Form("ort"), given.threads)
    for weights in given.weights:
        contenders[f"mskip, {weights}"] = ours(run, Form("ort", weights), given.threads)
    contenders["mskip, portable"] = ours(run, PORTABLE, given.threads)
    contenders["transformers, sdpa"] = hugging_face(base.model, "sdpa")
    contenders["transformers, eager"] = hugging_face(base.model, "eager")
    prompt = base.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    rows: list[dict[str, Any]] = []
    print(f"{'context':>7}  {'phase':7}  {'engine':20}  {'ms':>9}  {'ratio':>6}  spread")
    for context in given.context:
        times = measure(contenders, filled([prompt], context), given.repeats, given.steps)
        for row in rows_of(times, context, next(iter(contenders))):
            rows.append(row)
            print(
                f"{row['context']:7}  {row['phase']:7}  {row['engine']:20}  {row['ms']:9.2f}  "
                f"{row['ratio']:6.3f}  {row['spread']:.3f}",
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
