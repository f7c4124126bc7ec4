"""Per-token routing: every token decides for itself, from its own hidden state.

Source: the later revision of Router-Tuning, arXiv 2410.13184 (one decision a token
in place of one a sequence); the treatment of keys and values is that of
Mixture-of-Depths, arXiv 2404.02258. A token executes a routed sublayer where
``sigmoid(w . x + b) >= tau``, ``x`` being its input after the norm. No decision
depends on a later or another token, so scoring, prefill in chunks and decoding
agree. docs/per-token.md says what a skipped token leaves behind, and why.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mskip.compressor.errors import ModelError
from mskip.compressor.objective import logistic_noise, straight_through_gate
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, UNDECIDED, Call


def fresh_token_decisions(real: Tensor, routed: int) -> tuple[Tensor, Tensor]:
    """Decisions all UNDECIDED, [batch, sequence, routed] int8, and scores all NaN, float32.

    Args:
        real: [batch, sequence], true on real tokens.
        routed: number of routed sublayers.
    """
    shape = *real.shape, routed
    return (
        torch.full(shape, UNDECIDED, dtype=torch.int8, device=real.device),
        torch.full(shape, float("nan"), dtype=torch.float32, device=real.device),
    )


class TokenPass:
    """Inference: score every token, and run the sublayer for the tokens that execute.

    Padding is neither scored nor executed, and stays UNDECIDED.

    Args:
        routers: the routers.
        tau: threshold of each routed sublayer, [routed], float32.
        real: [batch, sequence] over this call's positions, true on real tokens.
        decisions: [batch, sequence, routed] int8 of UNDECIDED / SKIP / EXECUTE; those that
            are UNDECIDED are taken, in place.
        scores: same shape, float32; updated in place on real tokens.

    Raises:
        ValueError: the decisions are not those of this call and these routers.
    """

    def __init__(
        self, routers: Routers, tau: Tensor, real: Tensor, decisions: Tensor, scores: Tensor
    ) -> None:
        self.routers = routers
        self.tau = tau
        self.real = real
        self.decisions = decisions
        self.scores = scores
        expected = (*real.shape, len(routers.layers))
        if decisions.shape != expected:
            raise ValueError(
                f"decisions have shape {tuple(decisions.shape)}; this call has {expected[0]} "
                f"sequences, {expected[1]} positions and {expected[2]} routed sublayers"
            )

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        index = call.index
        score = torch.sigmoid(self.routers.token_logit(index, call.hidden))
        self.scores[..., index] = score.where(self.real, self.scores[..., index])
        given = self.decisions[..., index]
        taken = (score >= self.tau[index]).to(torch.int8)
        self.decisions[..., index] = taken.where(self.real & (given == UNDECIDED), given)
        return execute_tokens(call, self.real & (self.decisions[..., index] == EXECUTE))


def execute_tokens(call: Call, gate: Tensor) -> Tensor:
    """Execute the sublayer for the tokens whose gate is open, and skip it for the others.

    Args:
        call: of the sublayer.
        gate: [batch, sequence], bool; False on padding.

    Returns:
        [batch, sequence, hidden].
    """
    executed = call.tokens.execute(gate)
    if len(executed) == gate.numel():
        return executed.reshape(*gate.shape, -1)
    output = executed.new_empty(*gate.shape, executed.shape[-1])
    output[gate] = executed
    output[~gate] = call.tokens.skip(~gate).to(executed.dtype)
    return output


class TokenRelaxedPass:
    """Training: every token is computed both ways, and its gate mixes the two.

    In value this is `TokenPass` at tau 0.5: the gate is exactly 0 or 1, and tokens whose
    gate is shut are hidden from later ones. The gradient reaches the gate through the
    mix of the token's own output only, not through what later tokens see of it.

    Args:
        routers: the routers being tuned.
        real: [batch, sequence], true on real tokens.
        temperature: of the gate's backward sigmoid.
        noise: logistic noise, [batch, sequence, routed], or None.

    Attributes:
        logits: by routed sublayer, the logits of the real tokens without noise, [tokens] float32.
    """

    def __init__(
        self, routers: Routers, real: Tensor, temperature: float, noise: Tensor | None
    ) -> None:
        self.routers = routers
        self.real = real
        self.temperature = temperature
        self.noise = noise
        self.logits: dict[int, Tensor] = {}

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        logit = self.routers.token_logit(call.index, call.hidden)
        # A checkpointed layer comes by again in the backward pass.
        self.logits.setdefault(call.index, logit[self.real])
        noise = None if self.noise is None else self.noise[..., call.index]
        # Of padding too: nobody sees its key, and no loss its output.
        gate = straight_through_gate(logit, self.temperature, noise)
        executed = call.tokens.execute_all(gate.detach() > 0)
        skipped = call.tokens.skip(torch.ones_like(self.real)).view_as(executed)
        mix = gate.to(executed.dtype)[..., None]
        return executed * mix + skipped * (1 - mix)


def token_noise(seed: int, samples: Tensor, real: Tensor, routed: int) -> Tensor:
    """Logistic noise of each token's gates, [batch, sequence, routed] float32; 0 on padding.

    A function of the seed, the sample and the token: padding and batch-mates change nothing.

    Args:
        seed: of the optimiser step.
        samples: number of each sample, [batch] int64.
        real: [batch, sequence], true on real tokens.
        routed: number of routed sublayers.
    """
    noise = torch.zeros(*real.shape, routed, device=real.device)
    for row, sample in enumerate(samples.tolist()):
        generator = torch.Generator().manual_seed((seed * 2_147_483_629 + sample) % 2**63)
        shape = torch.empty(int(real[row].sum()), routed)
        noise[row, real[row]] = logistic_noise(shape, generator).to(real.device)
    return noise


def require_masks(model: PreTrainedModel) -> None:
    """Refuse an attention that takes no mask for every query and key.

    Raises:
        ModelError: the model was loaded with another attention.
    """
    name = model.config._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ModelError(
            f"attention '{name}' cannot run some tokens of a sequence.",
            'Load the model with attn_implementation="sdpa" or "eager".',
        )
