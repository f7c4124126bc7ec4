"""What the contenders of `tuning_cost.py` take, by arithmetic, and what a larger model would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mskip.compressor.recipe import TuningSpec
from mskip.compressor.rowwise import ROWS


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
        shut: share of the routed attentions that are not differentiated, their gate being shut.
    """

    lower: tuple[int, int, int]
    upper: tuple[int, int, int]
    head: int
    everywhere: bool
    gates: int
    logits: Callable[[int, int, int], int]
    shut: float = 0.0


def _lm_logits(tokens: int, answers: int, element: int) -> int:
    return 12 * tokens  # log probabilities and two gradients of them, float32


def _kl_logits(tokens: int, answers: int, element: int) -> int:
    return 2 * element * tokens + (2 * element + 16) * answers


def _row_logits(tokens: int, answers: int, element: int) -> int:
    return 36 * min(ROWS, answers)  # six float32 tables, and three as gradients


WORK = {
    "ours, first epoch": Work((1, 0, 0), (2, 1, 0), 4, False, 2, _row_logits, 0.5),
    "ours, later": Work((0, 0, 0), (1, 1, 0), 2, False, 2, _row_logits, 0.5),
    "plain": Work((1, 1, 0), (1, 1, 0), 2, True, 1, _lm_logits),
    "plain-stopped": Work((1, 0, 0), (1, 1, 0), 2, True, 1, _lm_logits),
    "plain-kl": Work((2, 1, 0), (2, 1, 0), 3, True, 1, _kl_logits),
    "full": Work((1, 1, 1), (1, 1, 1), 3, True, 0, _lm_logits),
}
# There the dense model's logits are computed in every epoch, see `RouterObjective`.
WORK_IN_16_BITS = {
    name: replace(work, head=3) if name.startswith("ours") else work for name, work in WORK.items()
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
        undifferentiated = 1 + work.shut * (shape.routed - 1)
        upper -= work.upper[1] * undifferentiated * (attention + 2 * scores)
    share = 1 if work.everywhere else answers
    return lower + upper + 2 * shape.hidden * shape.vocabulary * work.head * share


def kept_bytes_per_token(shape: Shape, work: Work, length: int, element: int) -> int:
    """What autograd keeps for backward, bytes a token of a batch padded to ``length``.

    A layer keeps both norms' inputs in float32; queries, keys and values (repeated to all
    heads), the attention's output and the mask's row; of the MLP the gate before and after its
    activation, and the other factor. Weights that are trained also need their inputs. The
    attention of the first routed layer is not differentiated where the layers below are not,
    and behind a shut gate the norm's input alone is kept.
    """
    inner = element * (4 * shape.attention + length)
    attention = 4 * shape.hidden + inner
    mlp = 4 * shape.hidden + element * 3 * shape.intermediate
    trained = element * (4 * shape.hidden + shape.intermediate) if work.upper[2] else 0
    if work.lower[1]:
        kept = shape.layers * (attention + mlp + trained)
    else:
        kept = shape.upper * (attention + mlp) - attention
    kept -= round(work.shut * (shape.routed - 1) * inner)
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
        work = WORK_IN_16_BITS[name]
        size = peak_bytes(LLAMA_8B, work, 1, big_length, scored, 2)
        minutes = tokens * flops_per_token(LLAMA_8B, work, big_length, answers) / per_second / 60
        here, plain = (
            flops_per_token(measured, WORK[each], length, answers) for each in (name, "plain")
        )
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
