"""Scores on the paper's tasks: of one engine, and of a run's methods side by side."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mskip.compressor.artifact import (
    Run,
    load_routers,
    routers_hash,
    routing_unit,
    tuned_by,
    versions,
)
from mskip.compressor.baselines import kept_count, kept_of
from mskip.compressor.errors import ArtifactError, MissingExtraError, MskipError
from mskip.compressor.files import read_json, sha256
from mskip.compressor.models import BaseModel
from mskip.compressor.progress import Progress, silent
from mskip.compressor.sublayers import require_unit
from mskip.exporters.answers import AnswerStore
from mskip.exporters.harness import harness_model, harness_tasks, judged, offline, quietly
from mskip.exporters.onnx_export import contract_of
from mskip.exporters.opening import open_runner
from mskip.exporters.reading import BATCH_TOKENS, GENERATION_TOKENS, Reader
from mskip.exporters.runner import Runner
from mskip.exporters.targets import PORTABLE, Form
from mskip.exporters.task_files import configs, definition, task_files
from mskip.exporters.torch_runner import TorchRunner
from mskip.exporters.trt_engine import built_form
from mskip.exporters.trt_runner import open_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mskip.exporters.contract import Contract

METHODS = ("dense", "static", "routed")
KEYS_AND_VALUES = 1 << 30
"""Bytes of keys and values of a batch of contexts that PyTorch continues."""


# -- figures ----------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error (sample deviation / sqrt n); no error of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"value": mean, "stderr": None}
    squares = sum((value - mean) ** 2 for value in values)
    return {"value": mean, "stderr": math.sqrt(squares / (len(values) - 1) / len(values))}


def average(figures: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean of independent figures with standard errors."""
    errors = [figure["stderr"] for figure in figures]
    known = [error for error in errors if error is not None]
    count = len(figures)
    return {
        "value": sum(figure["value"] or 0.0 for figure in figures) / count,
        "stderr": math.hypot(*known) / count if len(known) == count else None,
    }


def against(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float | None]:
    """Average difference to the dense model with its standard error, document by document.

    Both are right or wrong on the same documents, so the error of the difference is far
    smaller than the two errors of the averages suggest.
    """
    pairs = [(task["right"], dense["tasks"][name]["right"]) for name, task in row["tasks"].items()]
    return average(
        [
            mean_and_error([int(one) - int(other) for one, other in zip(*pair, strict=True)])
            for pair in pairs
        ]
    )


# -- one engine -------------------------------------------------------------------------------


def score_tasks(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    routing: Sequence[int] | None = None,
    task_dir: Path | None = None,
    limit: int | None = None,
    store: AnswerStore | None = None,
    max_length: int | None = None,
    max_tokens: int = BATCH_TOKENS,
    max_generation_tokens: int = GENERATION_TOKENS,
    label: str = "",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score tasks with one engine.

    Args:
        runner: the engine.
        tokenizer: of its model.
        tasks: names, see `mskip.exporters.task_files.PAPER`.
        routing: decisions to force, [routed] of 0 and 1; None leaves them to the routers.
        task_dir: folder with a ``<task>.jsonl`` each, and then no network; None is the hub.
        limit: documents of each task, chosen by lot (the same ones every time); None for all.
        store: answers of earlier.
        max_length: tokens that the model reads; None asks the tokenizer, or takes 2048.
        max_tokens: see `Reader`.
        max_generation_tokens: see `Reader`.
        label: stands before the task's name in the progress.
        progress: one unit a request.

    Returns:
        ``engine``; ``capacity``, the executed share over the contexts read, and ``skip_rate``;
        ``average``; ``tasks``: of each ``metric``, ``value``, ``stderr``, ``shots``,
        ``documents``, ``capacity``, and ``right``: 0 or 1 for each document;
        ``versions``; ``seconds``.

    Raises:
        MissingExtraError: lm_eval is not installed.
        DataError: a task's documents are missing or malformed.
    """
    load = harness_tasks(task_dir)
    started = time.monotonic()
    scores: dict[str, Any] = {}
    executed = contexts = 0
    with quietly(), offline() if task_dir is not None else nullcontext():
        for name in tasks:
            task = definition(name)
            reader = Reader(
                runner,
                lambda tokens: str(tokenizer.decode(tokens)),
                ends=[] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)],
                routing=routing,
                max_length=max_length or _max_length(tokenizer),
                max_tokens=max_tokens,
                max_generation_tokens=max_generation_tokens,
                store=store,
                stage=f"{label}{name}",
                progress=progress,
            )
            right = judged(task, load(task), harness_model(reader, tokenizer), limit)
            executed += sum(reader.executed.values())
            contexts += len(reader.executed)
            scores[name] = {
                "metric": task.metric,
                **mean_and_error(right),
                "shots": task.shots,
                "documents": len(right),
                "capacity": reader.capacity,
                "right": "".join(str(int(each)) for each in right),
            }
    calls = contexts * len(runner.contract.routed_layers)
    capacity = executed / calls if calls else None
    return {
        "engine": runner.name,
        "capacity": capacity,
        "skip_rate": None if capacity is None else 1.0 - capacity,
        "average": average(list(scores.values())),
        "tasks": scores,
        "versions": {**versions(), "lm_eval": version("lm_eval"), "datasets": version("datasets")},
        "seconds": round(time.monotonic() - started, 1),
    }


def check_tasks(tasks: Sequence[str], task_dir: Path | None) -> None:
    """Find out what would stop `score_tasks` before a model is loaded.

    Raises:
        MissingExtraError: lm_eval is not installed.
        DataError: documents in ``task_dir`` are missing or malformed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval")
    if task_dir is not None:
        for name in tasks:
            configs(definition(name), task_dir)


def _max_length(tokenizer: PreTrainedTokenizerBase) -> int:
    # Tokenizers that do not know say 10^30.
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1 << 24 else 2048


# -- a run ------------------------------------------------------------------------------------


def check_run(run: Run, engine: str, methods: Sequence[str], form: Form = PORTABLE) -> None:
    """Find out what would stop `score_run` before a model is loaded.

    Raises:
        ArtifactError: the run is not tuned, calibrated or (but for "torch") exported in that form.
        MskipError: an unknown engine or method, or routers that decide once a token.
    """
    require_unit(routing_unit(run), "sequence", "an engine")
    for kind, names, known in (("engine", [engine], ENGINES), ("method", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise MskipError(f"no {kind} '{unknown[0]}'.", f"There are: {', '.join(known)}.")
    forced_decisions(run, len(run.calibration()["tau"]), methods)
    if engine != "torch":
        _exported(run, built_form(run) if engine == "trt" else form)


def score_run(
    run: Run,
    base: BaseModel,
    *,
    engine: str = "torch",
    form: Form = PORTABLE,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str],
    task_dir: Path | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a run: the dense model, static removal and the run's routers, by one engine.

    All three are the same routed model with decisions forced or not, so they differ in the
    decisions and in nothing else; a compensation is in all of them. Static removal takes the
    order that was best on the tuning prompts, as the run's own comparison with routing does.
    Answers are kept in ``reports/tasks``, and each method is saved when it is done.

    Args:
        run: calibrated, and for "onnx" exported.
        base: its base model.
        engine: "torch", "onnx" or "trt", the engine that was built last.
        form: of the graph that "onnx" runs.
        methods: of `METHODS`.
        tasks: names, see `score_tasks`.
        task_dir: see `score_tasks`.
        limit: see `score_tasks`.
        progress: see `score_tasks`.

    Returns:
        The report, as saved in ``reports/tasks.json``: ``rows``, one a method and engine, with
        those of earlier calls on the same routers, tau, documents and limit. ``by`` of a row is
        "torch", or the name of the graph's form.

    Raises:
        ArtifactError: the run is not tuned, calibrated or (for "onnx") exported in that form.
        MskipError: an unknown engine or method.
    """
    check_run(run, engine, methods, form)
    by = form.name if engine == "onnx" else engine
    form = built_form(run) if engine == "trt" else form
    files = [] if task_dir is None else [p for name in tasks for p in task_files(name, task_dir)]
    subject = {
        "routers": routers_hash(run),
        "tau": run.calibration()["tau"],
        "source": "hub" if task_dir is None else "folder",
        "files": {path.name: sha256(path) for path in files},
        "limit": limit,
    }
    report: dict[str, Any] = {}
    with ENGINES[engine](run, base, form) as runner:
        masks = forced_decisions(run, len(runner.contract.routed_layers), methods)
        identity = _identity(run, base, runner, None if engine == "torch" else form)
        with AnswerStore(run.reports / "tasks" / "answers.jsonl", identity) as store:
            for method in methods:
                scores = score_tasks(
                    runner,
                    base.tokenizer,
                    tasks,
                    routing=masks[method],
                    task_dir=task_dir,
                    limit=limit,
                    store=store,
                    max_length=int(base.model.config.get_text_config().max_position_embeddings),
                    max_generation_tokens=generation_tokens(engine, runner.contract),
                    label=f"{by} {method}: ",
                    progress=progress,
                )
                row = {"method": method, "by": by, "tuned_by": tuned_by(run), **scores}
                report = {**subject, "rows": _merged(run, subject, row)}
                run.write_report("tasks", report)
    return report


def generation_tokens(engine: str, contract: Contract) -> int:
    """Padded tokens of a batch of contexts that are continued; see `Reader`.

    PyTorch leaves out the logits of the prompt, so keys and values are what it holds. On a CPU its
    products take 1.2 times as long for 32 sequences as for 8.
    """
    if engine != "torch":
        return GENERATION_TOKENS
    size: int = getattr(torch, contract.dtype).itemsize
    each = 2 * contract.layers * contract.kv_heads * contract.head_dim * size
    return max(GENERATION_TOKENS, KEYS_AND_VALUES // each)


def _identity(run: Run, base: BaseModel, runner: Runner, form: Form | None) -> dict[str, Any]:
    """All that decides an answer but the question; see `AnswerStore`."""
    exported = {} if form is None else _exported(run, form)
    return {
        "engine": runner.name,
        "graph": exported.get("sha256"),
        "model": base.sha256,
        "dtype": str(base.model.dtype),
        "device": base.model.device.type,
        "routers": routers_hash(run),
        "tau": runner.contract.tau,
        "versions": versions(),
    }


def _merged(run: Run, subject: Mapping[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows saved earlier about the same thing, with ``row`` in its place."""
    path = run.reports / "tasks.json"
    saved = read_json(path, "tasks report") if path.exists() else {}
    same = all(saved.get(key) == value for key, value in subject.items())
    rows = [
        each
        for each in (saved.get("rows", []) if same else [])
        if list(each["tasks"]) == list(row["tasks"])
        and (each["method"], each["by"]) != (row["method"], row["by"])
    ]
    rows.append(row)
    dense = {each["by"]: each for each in rows if each["method"] == "dense"}
    for each in rows:
        if each["by"] in dense and each["method"] != "dense":
            each["against_dense"] = against(each, dense[each["by"]])
    return sorted(rows, key=lambda each: (each["by"], METHODS.index(each["method"])))


def forced_decisions(run: Run, routed: int, methods: Sequence[str]) -> dict[str, list[int] | None]:
    """Decisions that each method forces, [routed] of 0 and 1; None leaves them to the routers.

    Args:
        run: its target says how many sublayers static removal keeps.
        routed: how many routed sublayers there are.
        methods: "static" among them asks for a tuned run.

    Raises:
        ArtifactError: "static", and the run has no order of removal.
    """
    masks: dict[str, list[int] | None] = {"dense": [1] * routed, "routed": None}
    if "static" not in methods:
        return masks
    if tuned_by(run) == "static":
        masks["static"] = None  # its constants remove what it removes, at any target
    else:
        kept = kept_of(_removal_order(run), kept_count(run.calibration()["target"], routed))
        masks["static"] = [int(index in kept) for index in range(routed)]
    return masks


def _removal_order(run: Run) -> list[int]:
    """Positions 0..routed-1, first removed first, by the rule that was best on tuning prompts.

    Where tuning compared none, it is the greedy order, or else the last one saved.
    """
    remedy = "Make it with: mskip tune"
    saved = run.report("tune", remedy)
    layers = read_json(run.path / "router_config.json", "router configuration", remedy)["layers"]
    try:
        orders = saved["removal_orders"]
        best = (saved.get("worth") or {}).get("rule")
        order = orders.get(best) or orders.get("greedy") or list(orders.values())[-1]
        return [layers.index(layer) for layer in order]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{run.reports / 'tune.json'} lacks the orders of removal.", "Tune again."
        ) from error


@contextmanager
def _torch(run: Run, base: BaseModel, form: Form) -> Iterator[Runner]:
    routers = load_routers(run, base).to(base.model.device)
    recipe = run.recipe()
    contract = contract_of(base, routers, run.calibration()["tau"], recipe.export.opset)
    with TorchRunner(base, routers, contract) as runner:
        yield runner


@contextmanager
def _onnx(run: Run, base: BaseModel, form: Form) -> Iterator[Runner]:
    yield open_runner(form.folder(run))


def _exported(run: Run, form: Form) -> dict[str, Any]:
    """The report of an export of these very routers."""
    exported: dict[str, Any] = run.report(
        form.report("export"), f"Make it with: {form.export_command}"
    )
    if exported.get("router_sha256") != routers_hash(run):
        raise ArtifactError(
            f"{form.folder(run)} is an export of other routers than {run.path} now holds.",
            f"Export again: {form.export_command}",
        )
    return exported


@contextmanager
def _trt(run: Run, base: BaseModel, form: Form) -> Iterator[Runner]:
    yield open_engine(form.folder(run))


ENGINES = {"torch": _torch, "onnx": _onnx, "trt": _trt}
