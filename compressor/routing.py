"""Decisions: how they are taken, carried and applied to one forward call.

A forward call of a patched model carries a *pass* in its keyword argument
``routing``. Each routed sublayer hands the pass a `Call`, which can execute or
skip it for chosen rows; the pass says what comes out. Nothing
is stored on the model's modules, so any number of calls can interleave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mskip.compressor.router import Routers

if TYPE_CHECKING:
    from mskip.compressor.token_call import TokenCall

UNDECIDED = -1
SKIP = 0
EXECUTE = 1

Rows = Tensor | None
"""Sequences of a batch, [n] int64; None means all of them."""


class Call:
    """One call of a routed sublayer, handed to the pass.

    Args:
        index: position of the routed sublayer, 0..routed-1.
        batch: sequences in the call.
        hidden: computes the input after its norm, [batch, sequence, hidden], and remembers it.
        execute: runs the sublayer for chosen rows, [n, sequence, hidden].
        skip: what it gives where it is skipped, for chosen rows, same shape. Of a block
            both give the new residual stream, else what is added to it.
        tokens: the same for chosen tokens instead of rows.
    """

    def __init__(
        self,
        index: int,
        batch: int,
        hidden: Callable[[], Tensor],
        execute: Callable[[Rows], Tensor],
        skip: Callable[[Rows], Tensor],
        tokens: TokenCall,
    ) -> None:
        self.index = index
        self.batch = batch
        self._hidden = hidden
        self.execute = execute
        self.skip = skip
        self.tokens = tokens

    @property
    def hidden(self) -> Tensor:
        """The sublayer's input after its norm, [batch, sequence, hidden]; computed when asked for.

        It is what the router scores, and what a compensation maps.
        """
        return self._hidden()


class Pass(Protocol):
    """What one forward call does at a routed sublayer."""

    def __call__(self, call: Call) -> Tensor:
        """Output of the routed sublayer, [batch, sequence, hidden]."""
        ...


def execute_rows(call: Call, gate: Tensor) -> Tensor:
    """Execute the sublayer for the rows whose gate is open, and skip it for the others.

    Args:
        call: of the sublayer.
        gate: [batch], bool.

    Returns:
        [batch, sequence, hidden].
    """
    return by_gate(gate, call.execute, call.skip)


def by_gate(
    gate: Tensor, opened: Callable[[Rows], Tensor], shut: Callable[[Rows], Tensor]
) -> Tensor:
    """Rows of one function where the gate is open, of the other where it is shut.

    Args:
        gate: [batch], bool.
        opened: of chosen rows gives [n, ...]; not called for none.
        shut: the same.

    Returns:
        [batch, ...].
    """
    rows = gate.nonzero().squeeze(1)
    if rows.numel() == gate.numel():
        return opened(None)
    if rows.numel() == 0:
        return shut(None)
    some = opened(rows)
    others = (~gate).nonzero().squeeze(1)
    output = some.new_empty(len(gate), *some.shape[1:])
    output = output.index_copy(0, rows, some)
    return output.index_copy(0, others, shut(others).to(some.dtype))


class HardPass:
    """Inference: take the decisions that are still open, execute the open rows only.

    Args:
        routers: the routers.
        tau: threshold of each routed sublayer, [routed], float32.
        prompt_mask: [batch, sequence] over this call's positions, true on prompt positions.
        decisions: [batch, routed], int8 of UNDECIDED / SKIP / EXECUTE; updated in place.
        scores: [batch, routed], float32; updated in place where a decision is taken.

    Raises:
        ValueError: the decisions are not those of this batch and these routers.
    """

    def __init__(
        self,
        routers: Routers,
        tau: Tensor,
        prompt_mask: Tensor,
        decisions: Tensor,
        scores: Tensor,
    ) -> None:
        self.routers = routers
        self.tau = tau
        self.prompt_mask = prompt_mask
        self.decisions = decisions
        self.scores = scores
        expected = (len(prompt_mask), len(routers.layers))
        if decisions.shape != expected:
            raise ValueError(
                f"decisions have shape {tuple(decisions.shape)}; this call has "
                f"{expected[0]} sequences and {expected[1]} routed sublayers"
            )
        # One look at the decisions for the whole call: decoding never scores.
        self.scoring = bool((decisions == UNDECIDED).any())

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        index = call.index
        if self.scoring:
            open_ = self.decisions[:, index] == UNDECIDED
            score = torch.sigmoid(self.routers.logit(index, call.hidden, self.prompt_mask))
            taken = (score >= self.tau[index]).to(torch.int8)
            self.scores[:, index] = torch.where(open_, score, self.scores[:, index])
            self.decisions[:, index] = torch.where(open_, taken, self.decisions[:, index])
        return execute_rows(call, self.decisions[:, index] == EXECUTE)


class ForcedPass:
    """Execute as told: baselines, and logits compared with decisions forced equal.

    Args:
        gates: [batch, routed], bool; [1, routed] holds for every sequence.
    """

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        return execute_rows(call, self.gates[:, call.index].expand(call.batch))


def fresh_decisions(batch: int, routed: int) -> tuple[Tensor, Tensor]:
    """Decisions all UNDECIDED, [batch, routed] int8, and scores all NaN, float32."""
    return (
        torch.full((batch, routed), UNDECIDED, dtype=torch.int8),
        torch.full((batch, routed), float("nan")),
    )


def forced(routing: Tensor) -> Tensor:
    """Check and convert given decisions.

    Args:
        routing: [batch, routed] of -1, 0, 1 (or bool).

    Returns:
        A copy, int8.

    Raises:
        ValueError: another value is in it.
    """
    decisions = routing.to(torch.int8, copy=True)
    if bool(((decisions < UNDECIDED) | (decisions > EXECUTE)).any()):
        raise ValueError("routing holds values other than -1 (undecided), 0 (skip), 1 (execute)")
    return decisions
