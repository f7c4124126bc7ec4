"""The graph contract: names, types and axes of every input and output, in one place.

One graph serves prefill and decoding. Decisions enter and leave as ``routing``:
an undecided entry (-1) is decided from the score and ``tau``, any other is
obeyed. Where attention or the block is routed, a layer's cache has a row for
each *executing* sequence, in batch order, so a skipping sequence holds no keys
or values there; a routed MLP leaves the cache as it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, write_json
from mskip.compressor.sublayers import Granularity

FORMAT = 6
CONTRACT = "contract.json"
"""File of the routed graph's contract in an export."""
UNSCORED = -1.0
"""Value in ``routing_scores`` where no score was computed (nothing was undecided)."""

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "past + sequence"
CAPACITY, KEPT = "capacity", "kept"

Target = Literal["portable", "ort", "trt", "trt-plugin"]
"""Standard operators only, the fused forms of ONNX Runtime, or what TensorRT builds: conditionals,
or operators of mskip's own that a plugin carries out."""
WITH_CAPACITY: tuple[Target, ...] = "trt", "trt-plugin"
"""Targets whose buffers have a fixed number of positions."""
Weights = Literal["float", "int8", "int4"]
"""As the model has them, or rounded to 8 or 4 bits in blocks."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: in the graph.
        dtype: numpy name.
        axes: symbol or size of each axis.
        optional: may be left out (inputs with a default).
    """

    name: str
    dtype: str
    axes: list[str | int]
    optional: bool = False


@dataclass(frozen=True)
class Contract:
    """What a deployer has to know about a graph.

    Attributes:
        layers: number of decoder layers.
        routed_layers: decoder layer index of each routed sublayer.
        kv_heads: key/value heads.
        head_dim: width of a head.
        vocabulary: width of the logits.
        dtype: of logits, keys and values.
        opset: ONNX opset.
        tau: default threshold of each routed sublayer.
        eos: token ids that end a sequence.
        pad: token id for padding.
        removed_layers: decoder layers that lack the sublayer (static graphs).
        granularity: which sublayer is routed or removed.
        compensation_rank: rank of the map that stands for a skipped sublayer; 0 for nothing.
        target: which operators the graph may use. For all but "portable", keys and values lie in
            buffers with room for more positions than are in them, the real tokens of a row come
            first (padding on the right), and logits are given for the columns named in
            ``logits_at``. For "trt" and "trt-plugin", the mask says of each position in the buffers
            whether it is attended to, and every buffer has a row for every sequence.
        weights: how the weights of products are stored.
        capacity: positions that a buffer has, where the graph fixes it; 0 where it does not.
        positions: of the longest sequence, where the graph has tables by position; 0 where it
            does not. They count from a row's first token, whatever ``position_ids`` says.
    """

    layers: int
    routed_layers: list[int]
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str
    opset: int
    tau: list[float]
    eos: list[int]
    pad: int
    removed_layers: list[int]
    granularity: Granularity = "attention"
    compensation_rank: int = 0
    target: Target = "portable"
    weights: Weights = "float"
    capacity: int = 0
    positions: int = 0

    def kv_axes(self, layer: int, length: str | int) -> list[str | int]:
        """Axes of a layer's keys or values; ``length`` is the symbol of its positions."""
        if self.buffered:
            length = self.capacity or CAPACITY
        rows = f"rows_{layer}" if layer in self.compact_layers else BATCH
        return [rows, self.kv_heads, length, self.head_dim]

    @property
    def buffered(self) -> bool:
        """Whether keys and values stay where they are, in buffers; see ``target``."""
        return self.target != "portable"

    @property
    def compact_layers(self) -> list[int]:
        """Decoder layers whose cache has a row for executing sequences only."""
        every = self.granularity == "mlp" or self.target in WITH_CAPACITY
        return [] if every else self.routed_layers

    @property
    def cached_layers(self) -> list[int]:
        """Decoder layers that have a cache."""
        gone = [] if self.granularity == "mlp" else self.removed_layers
        return [layer for layer in range(self.layers) if layer not in gone]

    def inputs(self) -> list[TensorSpec]:
        """Inputs in the order of the graph."""
        routed = len(self.routed_layers)
        seen = self.capacity or CAPACITY if self.target in WITH_CAPACITY else TOTAL
        specs = [
            TensorSpec("input_ids", "int64", [BATCH, SEQUENCE]),
            TensorSpec("attention_mask", "int64", [BATCH, seen]),
            TensorSpec("position_ids", "int64", [BATCH, SEQUENCE]),
        ]
        if self.buffered:
            specs.append(TensorSpec("logits_at", "int64", [BATCH, KEPT]))
        if routed:
            specs.append(TensorSpec("routing", "int64", [BATCH, routed]))
            specs.append(TensorSpec("tau", "float32", [routed], optional=True))
        for layer in self.cached_layers:
            for part in ("key", "value"):
                axes = self.kv_axes(layer, PAST)
                specs.append(TensorSpec(f"past_key_values.{layer}.{part}", self.dtype, axes))
        return specs

    def outputs(self) -> list[TensorSpec]:
        """Outputs in the order of the graph."""
        routed = len(self.routed_layers)
        positions = KEPT if self.buffered else SEQUENCE
        specs = [TensorSpec("logits", self.dtype, [BATCH, positions, self.vocabulary])]
        if routed:
            specs.append(TensorSpec("routing_out", "int64", [BATCH, routed]))
            specs.append(TensorSpec("routing_scores", "float32", [BATCH, routed]))
        for layer in self.cached_layers:
            for part in ("key", "value"):
                axes = self.kv_axes(layer, TOTAL)
                specs.append(TensorSpec(f"present.{layer}.{part}", self.dtype, axes))
        return specs

    def write(self, path: Path) -> None:
        """Save as JSON, with the tensors written out for people and other languages."""
        value = {
            "format": FORMAT,
            **asdict(self),
            "routing_values": {"undecided": -1, "skip": 0, "execute": 1},
            "unscored": UNSCORED,
            "inputs": [asdict(spec) for spec in self.inputs()],
            "outputs": [asdict(spec) for spec in self.outputs()],
        }
        write_json(path, value)


def read_contract(path: Path) -> Contract:
    """Read a ``contract.json``.

    Raises:
        ArtifactError: missing, damaged, or of another format.
    """
    value: Any = read_json(path, "contract", "Export the model with: mskip export")
    fields = Contract.__dataclass_fields__
    try:
        if value["format"] != FORMAT:
            raise ArtifactError(
                f"{path} has format {value['format']}; this mskip reads {FORMAT}.", "Export again."
            )
        return Contract(**{name: value[name] for name in fields})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} lacks the entry {error}.", "Export again.") from error
