"""Per-token routing: every token decides for itself, from its own hidden state.

Source: the later revision of Router-Tuning, arXiv 2410.13184 (one decision a token
in place of one a sequence); the treatment of keys and values is that of
Mixture-of-Depths, arXiv 2404.02258. A token executes a routed sublayer where
``sigmoid(w . x + b) >= tau``, ``x`` being its input after the norm. No decision
depends on a later or another token, so scoring, prefill in chunks and decoding
agree. docs/per-token.md says what a skipped token leaves behind, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mskip.compressor.calibration import Paths, find_tau
from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.errors import ModelError
from mskip.compressor.evaluation import PerSample, Quality, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import logistic_noise, straight_through_gate
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.routing import EXECUTE, UNDECIDED, Call
from mskip.compressor.samples import batches_of
from mskip.compressor.segments import SplitModel, Stem
from mskip.compressor.skipping import (
    Patch,
    as_tau,
    by_name,
    cache_of_call,
    patched,
    real_positions,
)
from mskip.compressor.token_cache import TokenCache

# -- one forward call -------------------------------------------------------------------------


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
        logits: of every call, the logits of the real tokens without noise, [tokens] float32.
    """

    def __init__(
        self, routers: Routers, real: Tensor, temperature: float, noise: Tensor | None
    ) -> None:
        self.routers = routers
        self.real = real
        self.temperature = temperature
        self.noise = noise
        self.logits: list[Tensor] = []

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        logit = self.routers.token_logit(call.index, call.hidden)
        self.logits.append(logit[self.real])
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


# -- calibration and quality ------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRouting:
    """How the tokens of one sample were routed.

    Attributes:
        decisions: [tokens, routed] bool, true where executed.
        scores: [tokens, routed] float32.
        prompt_length: the first so many tokens are the prompt's.
    """

    decisions: Tensor
    scores: Tensor
    prompt_length: int

    @property
    def prompt(self) -> Tensor:
        """Decisions of the prompt's tokens."""
        return self.decisions[: self.prompt_length]

    @property
    def answer(self) -> Tensor:
        """Decisions of the answer's tokens; none where there is no answer."""
        return self.decisions[self.prompt_length :]


def executed_share(parts: list[Tensor]) -> float:
    """Executed share of the calls in all ``parts`` ([tokens, routed] bool); NaN where none."""
    calls = sum(part.numel() for part in parts)
    return sum(int(part.sum()) for part in parts) / calls if calls else float("nan")


def share_interval(parts: list[Tensor], *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the executed share, by the bootstrap over prompts.

    Tokens of one prompt hang together, so whole prompts are drawn, each with its length.

    Args:
        parts: decisions of each prompt, [tokens, routed] bool; those without tokens are left out.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    parts = [part for part in parts if part.numel()]
    if not parts:
        return [float("nan")] * 2
    executed = torch.tensor([int(part.sum()) for part in parts], dtype=torch.float64)
    calls = torch.tensor([part.numel() for part in parts], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(parts), (resamples, len(parts)), generator=generator)
    shares = executed[draws].sum(1) / calls[draws].sum(1)
    return [float(q) for q in torch.quantile(shares, torch.tensor([0.025, 0.975]).double())]


class TokenScorer:
    """Routes samples in the gated forward pass; the model must be patched.

    Args:
        base: the base model.
        routers: its routers.
        samples: whole samples; what lies below the first routed layer is kept.
        batch_size: samples per forward pass.
    """

    def __init__(
        self, base: BaseModel, routers: Routers, samples: list[Sample], batch_size: int = 16
    ) -> None:
        require_masks(base.model)
        self.routers = routers
        self.samples = samples
        self.split = SplitModel(base.model, routers.layers[0])
        # As `batches_of` has them.
        self._order = sorted(range(len(samples)), key=lambda n: len(samples[n].input_ids))
        self._stems: list[tuple[Tensor, Stem]] = []
        with torch.no_grad():
            for batch in batches_of(samples, base, batch_size):
                inputs = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
                self._stems.append((batch["attention_mask"].bool(), self.split.stem(*inputs)))

    @torch.no_grad()
    def __call__(self, tau: Tensor, numbers: list[int] | None = None) -> list[TokenRouting]:
        """Route some samples.

        Args:
            tau: [routed], float32.
            numbers: which samples; None routes all.

        Returns:
            One routing a sample, in the order of ``numbers``.
        """
        wanted = set(range(len(self.samples)) if numbers is None else numbers)
        found: dict[int, TokenRouting] = {}
        start = 0
        for real, stem in self._stems:
            batch = self._order[start : start + len(real)]
            start += len(real)
            rows = [row for row, number in enumerate(batch) if number in wanted]
            if not rows:
                continue
            part = stem if len(rows) == len(batch) else stem.rows(rows)
            routing = TokenPass(
                self.routers,
                tau.to(real.device),
                real[rows],
                *fresh_token_decisions(real[rows], len(self.routers.layers)),
            )
            self.split.finish(part, routing)
            for n, row in enumerate(rows):
                found[batch[row]] = TokenRouting(
                    (routing.decisions[n, real[row]] == EXECUTE).cpu(),
                    routing.scores[n, real[row]].cpu(),
                    self.samples[batch[row]].prompt_length,
                )
        return [
            found[number] for number in (range(len(self.samples)) if numbers is None else numbers)
        ]


def token_scores(
    base: BaseModel,
    routers: Routers,
    tau: float | Tensor | list[float],
    samples: list[Sample],
    batch_size: int = 16,
) -> list[TokenRouting]:
    """Scores and decisions of every token, prompt and answer, in the gated pass at ``tau``.

    Args:
        base: the base model, not patched.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.
        samples: with or without answers.
        batch_size: samples per forward pass.
    """
    with patched(base.model, routers.sublayers):
        scorer = TokenScorer(base, routers, samples, batch_size)
        return scorer(as_tau(tau, len(routers.layers)))


@dataclass(frozen=True)
class TokenTau:
    """A threshold for per-token routing.

    Attributes:
        tau: the threshold, in the middle of the gap between the nearest scores.
        capacity: executed share of the prompt tokens' calls.
        interval: 95 % interval of it over prompts.
        answer_capacity: executed share of the answer tokens' calls; NaN without answers.
        answer_interval: 95 % interval of it over prompts.
        evaluations: trials of tau that ran prompts.
    """

    tau: float
    capacity: float
    interval: list[float]
    answer_capacity: float
    answer_interval: list[float]
    evaluations: int


def find_token_tau(
    base: BaseModel,
    routers: Routers,
    target: float,
    samples: list[Sample],
    max_evaluations: int = 40,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TokenTau:
    """Find the global tau whose capacity over prompt tokens is nearest to ``target``.

    Searched in the gated pass, as scores of later layers change with tau; see `find_tau`,
    whose unit, the call, is here one token at one routed sublayer.

    Args:
        base: the base model, not patched.
        routers: its routers.
        target: wanted capacity, 0..1.
        samples: tau is found on their prompts; answers are routed once at the end.
        max_evaluations: most trials that run prompts.
        batch_size: samples per forward pass.
        progress: one unit a trial.

    Raises:
        UnreachableError: scores tie around the target.
    """
    routed = len(routers.layers)
    with patched(base.model, routers.sublayers):
        prompts = [Sample(s.input_ids[: s.prompt_length], s.prompt_length) for s in samples]
        paths = _token_paths(TokenScorer(base, routers, prompts, batch_size))
        found = find_tau(paths, target, max_evaluations, progress)
        routings = TokenScorer(base, routers, samples, batch_size)(as_tau(found.tau, routed))
    asked, answered = [each.prompt for each in routings], [each.answer for each in routings]
    return TokenTau(
        found.tau,
        executed_share(asked),
        share_interval(asked),
        executed_share(answered),
        share_interval(answered),
        found.evaluations,
    )


def _token_paths(scorer: TokenScorer) -> Paths:
    """All tokens of all prompts as the calls of one path.

    Within it every prompt has a path of its own, so that a trial of tau runs only the
    prompts that it changes. Those are padded to one length with calls that never execute.
    """
    lengths = [len(sample.input_ids) for sample in scorer.samples]
    routed = len(scorer.routers.layers)
    width = max(lengths) * routed
    real = torch.arange(width) < torch.tensor(lengths)[:, None] * routed

    def prompts(tau: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        decisions = torch.zeros(len(numbers), width, dtype=torch.bool)
        scores = torch.full((len(numbers), width), -1.0)
        for row, routing in enumerate(scorer(tau[:routed], numbers)):
            decisions[row, : routing.decisions.numel()] = routing.decisions.flatten()
            scores[row, : routing.scores.numel()] = routing.scores.flatten()
        return decisions, scores

    by_prompt = Paths(prompts, len(lengths), width)

    def together(tau: Tensor, _: list[int]) -> tuple[Tensor, Tensor]:
        decisions, scores = by_prompt.at(float(tau[0]))
        return decisions[real][None], scores[real][None]

    return Paths(together, 1, sum(lengths) * routed)


@dataclass(frozen=True)
class TokenQuality:
    """Quality on the answers, and what it was reached with.

    Attributes:
        per_sample: sums over the answer tokens of every sample, those of like length together.
        capacity: executed share of the prompt tokens' calls.
        answer_capacity: executed share of the answer tokens' calls.
    """

    per_sample: PerSample
    capacity: float
    answer_capacity: float

    @property
    def quality(self) -> Quality:
        """KL to the dense model and perplexity, over all answer tokens."""
        return self.per_sample.quality()


def token_pass(
    routers: Routers, tau: Tensor, taken: list[tuple[Batch, TokenPass]]
) -> Callable[[Batch], TokenPass]:
    """A pass maker for `Reference`: routes every token of prompt and answer.

    Args:
        routers: the routers.
        tau: [routed].
        taken: receives every batch with its pass, which holds the decisions afterwards.
    """

    def make(batch: Batch) -> TokenPass:
        real = batch["attention_mask"].bool()
        fresh = fresh_token_decisions(real, len(routers.layers))
        taken.append((batch, TokenPass(routers, tau.to(real.device), real, *fresh)))
        return taken[-1][1]

    return make


def token_quality(
    base: BaseModel,
    routers: Routers,
    tau: float | Tensor | list[float],
    samples: list[Sample],
    batch_size: int = 8,
    progress: Progress = silent,
) -> TokenQuality:
    """KL to the dense model and perplexity on the answers, every token routed at ``tau``.

    Args:
        base: the base model, not patched.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.
        samples: with answers.
        batch_size: samples per forward pass.
        progress: shows the dense forward passes.
    """
    require_masks(base.model)
    taken: list[tuple[Batch, TokenPass]] = []
    with patched(base.model, routers.sublayers):
        reference = Reference(base, routers.layers[0], samples, batch_size, progress)
        make = token_pass(routers, as_tau(tau, len(routers.layers)), taken)
        per_sample = reference.per_sample(make)
    asked = [each.decisions[batch["prompt_mask"]] == EXECUTE for batch, each in taken]
    answered = [
        each.decisions[each.real & ~batch["prompt_mask"]] == EXECUTE for batch, each in taken
    ]
    return TokenQuality(per_sample, executed_share(asked), executed_share(answered))


# -- attached to a model ----------------------------------------------------------------------


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


class TokenSkip:
    """A model with its routers attached, routed token by token; see `MindSkip` for the manner.

    Every call scores its own tokens, answers too, and the `TokenCache` that it returns or is
    given holds keys and values of executed tokens only. The keyword argument ``routing`` (a
    pass) takes full control.

    Args:
        model: a supported causal LM with "sdpa" or "eager" attention.
        routers: its routers.
        tau: one threshold, or one per routed sublayer.

    Raises:
        ModelError: see `Patch` and `require_masks`.
    """

    def __init__(
        self, model: PreTrainedModel, routers: Routers, tau: float | Tensor | list[float] = 0.5
    ) -> None:
        require_masks(model)
        self.model = model
        self.routers = routers.to(model.device)
        self.tau = as_tau(tau, len(routers.layers)).to(model.device)
        self._patch = Patch(model, routers.sublayers)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def detach(self) -> None:
        """Take routers and patches out; the model is bitwise what it was."""
        self._hook.remove()
        self._patch.restore()

    def __enter__(self) -> TokenSkip:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def cache(self) -> TokenCache:
        """An empty cache."""
        return TokenCache(self.model.config, self.routers.sublayers)

    def token_pass(self, real: Tensor, routing: Tensor | None = None) -> TokenPass:
        """A pass for one call without a cache; its ``decisions`` hold the outcome afterwards.

        Args:
            real: [batch, sequence], true on real tokens.
            routing: given decisions, [batch, sequence, routed] of -1, 0, 1.
        """
        decisions, scores = fresh_token_decisions(real, len(self.routers.layers))
        if routing is not None:
            decisions = routing.to(decisions, copy=True)
        return TokenPass(self.routers, self.tau, real, decisions, scores)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = by_name(module, args, kwargs)
        if "routing" in kwargs:
            # The model would make a cache of its own, which cannot hold single tokens.
            kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
            return (), kwargs
        kwargs.pop("prompt_mask", None)  # Tokens of the answer decide for themselves too.
        real = real_positions(kwargs)
        cache = cache_of_call(kwargs, self.model, TokenCache, self.cache)
        kwargs["past_key_values"] = cache
        record = fresh_token_decisions(real, len(self.routers.layers))
        if cache is not None:
            record = cache.extend(*record)
        kwargs["routing"] = TokenPass(self.routers, self.tau, real, *record)
        return (), kwargs
