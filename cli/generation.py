"""Greedy generation token by token, with what routing decided."""

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
    from mskip.exporters.runner import Ints, Runner, State


@contextmanager
def opened_engine(run: Run, name: str) -> Iterator[tuple[Runner, PreTrainedTokenizerBase]]:
    """The engine ("onnx" or "torch") of a run, and its tokenizer.

    Raises:
        ModelError: the routers decide once a token, which neither runs.
    """
    from mskip.compressor.artifact import routing_unit
    from mskip.compressor.sublayers import require_unit

    require_unit(routing_unit(run), "sequence", "mskip generate")
    if name == "onnx":
        from mskip.compressor.models import load_tokenizer
        from mskip.exporters.ort_runner import OrtRunner

        with console.progress() as progress:
            progress("load engine", 0, 1)
            engine = OrtRunner(run.onnx)
            tokenizer = load_tokenizer(run.onnx)
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


def one(tokens: list[int]) -> Ints:
    """A batch of one sequence, [1, tokens]."""
    return np.array([tokens], dtype=np.int64)


def following(runner: Runner, state: State, max_new_tokens: int) -> Iterator[tuple[int, State]]:
    """Greedy tokens after a prefill, the end token left out, each with the state it came from."""
    for step in range(max_new_tokens):
        token = int(state.logits[0, -1].argmax())
        if token in runner.contract.eos:
            return
        yield token, state
        if step < max_new_tokens - 1:
            state = runner.extend(state, one([token]))


class TextStream:
    """Text of tokens as they come, held back inside a character of several tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = 0

    def text(self) -> str:
        """All of it."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def add(self, token: int) -> str:
        """What a further token lets be shown."""
        self.tokens.append(token)
        text = self.text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._new(text)

    def rest(self) -> str:
        """What was held back until the end."""
        return self._new(self.text())

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def dense_kv_bytes(contract: Contract, tokens: int) -> int:
    """Bytes of keys and values that one sequence holds when nothing is skipped."""
    width = 2 * contract.kv_heads * contract.head_dim * np.dtype(contract.dtype).itemsize
    return contract.layers * width * tokens


def routing_report(
    contract: Contract, first: State, last: State, tau: float | None, kv_bytes: int
) -> dict[str, Any]:
    """Decisions, capacity and memory of one sequence."""
    taus = contract.tau if tau is None else [tau] * len(contract.routed_layers)
    rows = [
        {"layer": layer, "score": float(score), "tau": float(limit), "executed": bool(decision)}
        for layer, score, limit, decision in zip(
            contract.routed_layers, first.scores[0], taus, first.routing[0], strict=True
        )
    ]
    executed = sum(bool(row["executed"]) for row in rows)
    return {
        "layers": rows,
        "capacity": executed / len(rows),
        "skip_rate": 1 - executed / len(rows),
        "kv_bytes": kv_bytes,
        "kv_bytes_dense": dense_kv_bytes(contract, last.mask.shape[1]),
    }
