"""The engine of a run, a prompt for it, and what routing decided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mskip.cli import console
from mskip.cli.session import fetch, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mskip.compressor.artifact import Run
    from mskip.exporters.contract import Contract
    from mskip.exporters.runner import Runner, State
    from mskip.exporters.targets import Form


@contextmanager
def opened_engine(
    run: Run, name: str, form: Form
) -> Iterator[tuple[Runner, PreTrainedTokenizerBase]]:
    """The engine of a run ("onnx", "torch" or "trt"), and its tokenizer.

    Args:
        run: calibrated.
        name: of the engine.
        form: of the graph that "onnx" runs; "trt" runs what was built last.

    Raises:
        ModelError: the routers decide once a token, which neither runs.
    """
    from mskip.compressor.artifact import routing_unit
    from mskip.compressor.sublayers import require_unit

    require_unit(routing_unit(run), "sequence", "mskip generate")
    if name != "torch":
        from mskip.compressor.models import load_tokenizer
        from mskip.exporters.opening import open_runner
        from mskip.exporters.trt_engine import built_form
        from mskip.exporters.trt_runner import open_engine

        engine: Runner
        with console.progress() as progress:
            progress("load engine", 0, 1)
            if name == "trt":
                folder = built_form(run).folder(run)
                engine = open_engine(folder)
            else:
                folder = form.exported(run)
                engine = open_runner(folder)
            tokenizer = load_tokenizer(folder)
            progress("load engine", 1, 1)
        yield engine, tokenizer
        return
    tau = run.calibration()["tau"]
    from mskip.compressor.artifact import load_routers
    from mskip.exporters.onnx_export import contract_of
    from mskip.exporters.torch_runner import TorchRunner

    recipe = run.recipe()
    fetch(recipe.model)
    with console.progress() as progress:
        base = load_model(recipe.model, progress)
    routers = load_routers(run, base).to(base.model.device)
    with TorchRunner(base, routers, contract_of(base, routers, tau, recipe.export.opset)) as runner:
        yield runner, base.tokenizer


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt as the router saw prompts when it was tuned: in the chat template, if any.

    Raises:
        DataError: it has no tokens.
    """
    from mskip.compressor.data import Conversation, Message
    from mskip.compressor.encoding import encode
    from mskip.compressor.errors import DataError

    sample = encode(Conversation((Message("user", prompt),)), tokenizer, 2**31)
    if sample is None:
        raise DataError("the prompt has no tokens.")
    return sample.input_ids


def dense_kv_bytes(contract: Contract, tokens: int) -> int:
    """Bytes of keys and values that one sequence holds when nothing is skipped."""
    width = 2 * contract.kv_heads * contract.head_dim * np.dtype(contract.dtype).itemsize
    return contract.layers * width * tokens


def routing_report(
    contract: Contract, state: State, tau: float | None, kv_bytes: int
) -> dict[str, Any]:
    """Decisions, capacity and memory of one sequence."""
    taus = contract.tau if tau is None else [tau] * len(contract.routed_layers)
    rows = [
        {"layer": layer, "score": float(score), "tau": float(limit), "executed": bool(decision)}
        for layer, score, limit, decision in zip(
            contract.routed_layers, state.scores[0], taus, state.routing[0], strict=True
        )
    ]
    executed = sum(bool(row["executed"]) for row in rows)
    return {
        "layers": rows,
        "capacity": executed / len(rows),
        "skip_rate": 1 - executed / len(rows),
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": dense_kv_bytes(contract, state.mask.shape[1]),
    }
