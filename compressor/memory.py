"""What tuning takes in memory, by arithmetic, so that it can be said before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mskip.compressor.recipe import Recipe
from mskip.compressor.rowwise import ROWS
from mskip.compressor.sharding import process_count

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TuningMemory:
    """Estimated bytes on the device of the base model, at the peak of a step.

    Attributes:
        weights: of the base model; where its layers are spread over processes, one share of
            them, three whole layers, and what every process has whole.
        activations: what the backward pass keeps of the layers from the first routed one up.
        logits: of the rows that exist at one time, of teacher and student.
        store: dense activations kept between epochs, at most.
    """

    weights: int
    activations: int
    logits: int
    store: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.logits + self.store


def tuning_memory(
    recipe: Recipe,
    config: dict[str, Any],
    weights: int,
    samples: int,
    processes: int | None = None,
) -> TuningMemory:
    """Estimate the memory of `tune_run`.

    Of each layer the backward pass keeps, a token: both norms' inputs in float32; queries,
    keys and values (repeated to all heads) and the attention's output; of the MLP the gate
    before and after its activation and the other factor; and the mask's row. With
    checkpointing only the layers' inputs stay, and one layer's worth. Libraries and a GPU's
    context are not in it.

    Args:
        recipe: the resolved recipe.
        config: of the text model, ``config.json``.
        weights: bytes of the weights as they are loaded.
        samples: tuning samples, at most.
        processes: of the launch; None goes by the environment.
    """
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    inner = heads * int(config.get("head_dim") or hidden // heads)
    element = _BYTES[recipe.model.dtype]
    length, batch = recipe.tuning.max_length, recipe.tuning.batch_size
    first = recipe.routing.candidates(layers)[0]
    layer = 8 * hidden + element * (4 * inner + length + 3 * int(config["intermediate_size"]))
    upper = layers - first
    kept = upper * layer
    if recipe.tuning.gradient_checkpointing:
        kept = upper * element * hidden + layer
    store = min(int(recipe.tuning.cache_gib * 2**30), samples * 2 * length * hidden * element)
    if recipe.model.shard:
        weights = _share_of(weights, config, element, processes or process_count())
        store = 0  # see `Processes.tune`
    return TuningMemory(
        weights=weights,
        activations=batch * length * kept,
        # Float32 logits of both models, their difference and the gradient.
        logits=4 * 4 * ROWS * int(config["vocab_size"]),
        store=store,
    )


def _share_of(weights: int, config: dict[str, Any], element: int, processes: int) -> int:
    """Bytes of the weights in each of several processes; see `shard_layers`."""
    table = int(config["vocab_size"]) * int(config["hidden_size"]) * element
    whole = min(weights, table * (1 if config.get("tie_word_embeddings") else 2))
    layers = weights - whole
    # The layer that runs, the buffer in which it came, and the next one's.
    three = 3 * layers // int(config["num_hidden_layers"])
    return whole + min(layers, layers // processes + three)


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a folder's safetensors weights when loaded as ``dtype``.

    Read from the files' headers, which name every tensor's type and shape.
    """
    import math

    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count * _BYTES[dtype]
