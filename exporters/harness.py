"""lm-evaluation-harness on any `Runner`: its model interface, its tasks, its manners.

The harness hands over context and continuation together; the `Reader` takes them apart.
lm_eval is imported here alone, and only when something is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mskip.compressor.errors import DataError, MissingExtraError
from mskip.exporters.reading import Reader
from mskip.exporters.task_files import Definition, configs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED = 256
"""Tokens generated where a task does not say, as in the harness."""
SEED = 1234
"""Of the examples in a prompt, the harness's own; and of the choice of documents."""


def harness_model(reader: Reader, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A model of the harness that answers with a reader.

    Prompts become tokens by the harness's own rules, but that no tokenizer closes them with
    an end token.

    Args:
        reader: of the engine.
        tokenizer: of its model.

    Raises:
        MissingExtraError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise MissingExtraError("lm_eval", "eval") from None
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = list(tokenizer("")["input_ids"])
    opening = added[:1] if added and added[0] == bos else []

    class RunnerModel(TemplateLM):  # type: ignore[misc]
        """See `harness_model`."""

        @property
        def eot_token_id(self) -> Any:
            return eos

        @property
        def prefix_token_id(self) -> Any:
            return eos if bos is None else bos

        @property
        def max_length(self) -> int:
            return reader.max_length

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            # verbose=False: the length is the reader's to watch.
            encoded = tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
            if add_special_tokens is None:
                add_special_tokens = bos is None or not string.startswith(str(tokenizer.bos_token))
            return [*opening, *encoded] if add_special_tokens else list(encoded)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return reader.likelihoods([(context, tokens) for _, context, tokens in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            texts = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=reader.max_length,
                    context_len=1,
                )
                texts.append([make_disjoint_window(window) for window in windows])
            answers = iter(reader.likelihoods([pair for windows in texts for pair in windows]))
            return [sum(next(answers)[0] for _ in windows) for windows in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [
                (self.tok_encode(request.args[0]), *generation(request.args[1]))
                for request in requests
            ]
            written = reader.continuations(asked)
            return [
                cut(str(tokenizer.decode(tokens, skip_special_tokens=True)), stops)
                for tokens, (_, stops, _) in zip(written, asked, strict=True)
            ]

    return RunnerModel()


def generation(arguments: dict[str, Any]) -> tuple[list[str], int]:
    """Stop strings and most tokens of the harness's generation arguments.

    Raises:
        DataError: it asks for sampling.
    """
    if arguments.get("do_sample"):
        raise DataError(
            "a task asks for sampling (do_sample); here decoding is greedy.",
            "Evaluate a task that decodes greedily.",
        )
    names = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
    given = [arguments[name] for name in names if arguments.get(name) is not None]
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    return [stop for stop in stops if stop], int(given[0] if given else GENERATED)


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0]
    return text


# -- tasks ------------------------------------------------------------------------------------


def harness_tasks(task_dir: Path | None) -> Callable[[Definition], list[Any]]:
    """A function that gives the harness's tasks of one of ours: one, or one a subject.

    Args:
        task_dir: folder with the documents; None takes the harness's own tasks from the hub.

    Raises:
        MissingExtraError: lm_eval is not installed.
        DataError: (the function) the documents cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("lm_eval", "eval") from None
    manager = TaskManager(include_defaults=task_dir is None)

    def load(task: Definition) -> list[Any]:
        if task_dir is not None:
            return list(manager.load(configs(task, task_dir))["tasks"].values())
        try:
            return list(manager.load([task.name])["tasks"].values())
        except Exception as error:  # of datasets, the hub and the connection alike
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"cannot load task {task.name} from the hub: {reason}",
                "Check the network, or give its documents with --task-dir FOLDER.",
            ) from error

    return load


def judged(
    task: Definition, parts: list[Any], model: Any, limit: int | None, *, skip: int = 0
) -> list[float]:
    """The task's metric for every scored document.

    Args:
        task: which metric, and how many shots.
        parts: the harness's tasks.
        model: see `harness_model`.
        limit: documents over all parts, chosen by lot; None for all, in the harness's order.
        skip: documents that come first in the lot and are left out; not without a limit.
    """
    from lm_eval.evaluator import evaluate

    chosen = parts if limit is None else _drawn(parts, limit, skip)
    if not chosen:
        return []
    for part in chosen:
        part.set_config(key="num_fewshot", value=task.shots)
        part.set_fewshot_seed(seed=SEED)
    found = evaluate(
        lm=model,
        task_dict={"tasks": {part.task_name: part for part in chosen}},
        bootstrap_iters=0,
        log_samples=True,
    )
    return [
        float(sample[task.metric])
        for part in chosen
        for sample in sorted(found["samples"][part.task_name], key=lambda each: each["doc_id"])
        if sample["filter"] == task.filter
    ]


def _drawn(parts: list[Any], limit: int, skip: int) -> list[Any]:
    """Keep ``limit`` documents over all parts; a smaller limit keeps the first ones of a larger.

    Files and splits are sorted here and there, so the first documents would not do.
    """
    pairs = [
        (number, index)
        for number, part in enumerate(parts)
        for index in range(len(part.dataset[_split(part)]))
    ]
    random.Random(SEED).shuffle(pairs)
    kept = []
    for number, part in enumerate(parts):
        indices = [index for of, index in pairs[skip : skip + limit] if of == number]
        if indices:
            part.dataset[_split(part)] = part.dataset[_split(part)].select(indices)
            kept.append(part)
    return kept


def _split(part: Any) -> str:
    return str(part.config.test_split or part.config.validation_split)


# -- the harness's manners --------------------------------------------------------------------


@contextmanager
def quietly() -> Iterator[None]:
    """The harness without its log and its bars, while the block runs."""
    import logging

    from lm_eval.api import task as module

    log = logging.getLogger("lm_eval")
    level, bar = log.level, module.tqdm
    log.setLevel(logging.CRITICAL)
    module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        log.setLevel(level)
        module.tqdm = bar


@contextmanager
def offline() -> Iterator[None]:
    """The hub's libraries without the network, while the block runs.

    Their environment variables are read at import only, so what they were read into is set.
    """
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = datasets.config, huggingface_hub.constants
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
