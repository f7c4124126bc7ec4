"""Configurations of models in Triton's text form (``config.pbtxt``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mskip.exporters.contract import Contract, TensorSpec

TYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint64": "TYPE_UINT64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}
"""Triton's names of dtypes."""


class Word(str):
    """A name of an enumeration, which stands without quotes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model.

    Attributes:
        name: of it.
        dtype: key of `TYPES`.
        dims: sizes without the batch, -1 for any.
        optional: an input that may be left out.
    """

    name: str
    dtype: str
    dims: Sequence[int] = (1,)
    optional: bool = False

    def message(self) -> dict[str, Any]:
        """For `pbtxt`."""
        value = {"name": self.name, "data_type": Word(TYPES[self.dtype]), "dims": list(self.dims)}
        return {**value, "optional": True} if self.optional else value


@dataclass(frozen=True)
class Model:
    """A model's configuration.

    Attributes:
        name: of it, and of its folder.
        inputs: in order.
        outputs: in order.
        backend: "python", "onnxruntime" or "tensorrt"; "" for an ensemble.
        max_batch_size: 0 where dims name the batch.
        instances: how many are loaded.
        decoupled: a request has any number of answers.
        parameters: for its own use.
        extra: further entries.
    """

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    backend: str = "python"
    max_batch_size: int = 1
    instances: int = 1
    decoupled: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def text(self, device: str = "cpu") -> str:
        """The file, for "cpu" or "gpu"."""
        value: dict[str, Any] = {"name": self.name}
        if not self.backend:
            value["platform"] = "ensemble"
        elif self.backend == "python":
            value["backend"] = "python"
        else:
            value["backend"] = self.backend
            value["platform"] = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[
                self.backend
            ]
        value["max_batch_size"] = self.max_batch_size
        value["input"] = [each.message() for each in self.inputs]
        value["output"] = [each.message() for each in self.outputs]
        value["version_policy"] = {"latest": {"num_versions": 1}}
        if self.decoupled:
            value["model_transaction_policy"] = {"decoupled": True}
        if self.backend:
            kind = Word("KIND_GPU" if device == "gpu" else "KIND_CPU")
            value["instance_group"] = [{"count": self.instances, "kind": kind}]
        if self.parameters:
            value["parameters"] = [
                {"key": key, "value": {"string_value": text}}
                for key, text in self.parameters.items()
            ]
        return pbtxt({**value, **self.extra})


def pbtxt(value: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text form; lists are repeated fields."""
    lines = []
    for key, entry in value.items():
        for each in entry if isinstance(entry, list) and key != "dims" else [entry]:
            if isinstance(each, Mapping):
                inner = pbtxt(each, indent + "  ")
                lines.append(f"{indent}{key} {{\n{inner}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(each)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[ {', '.join(map(str, value))} ]"
    return json.dumps(value)


# -- the models -------------------------------------------------------------------------------


def tokenizer_model(queue_delay_us: int) -> Model:
    """Text to token ids."""
    delay = {"dynamic_batching": {"max_queue_delay_microseconds": queue_delay_us}}
    return Model(
        "tokenizer",
        [Tensor("text_input", "string"), Tensor("chat", "bool", optional=True)],
        [Tensor("input_ids", "int64", (-1,))],
        extra=delay if queue_delay_us else {},
    )


GENERATE_INPUTS = [
    Tensor("text_input", "string", optional=True),
    Tensor("input_ids", "int64", (-1,), optional=True),
    Tensor("chat", "bool", optional=True),
    Tensor("stream", "bool", optional=True),
    Tensor("max_tokens", "int32", optional=True),
    Tensor("stop_words", "string", (-1,), optional=True),
    Tensor("temperature", "float32", optional=True),
    Tensor("top_p", "float32", optional=True),
    Tensor("top_k", "int32", optional=True),
    Tensor("seed", "uint64", optional=True),
    Tensor("frequency_penalty", "float32", optional=True),
    Tensor("presence_penalty", "float32", optional=True),
    Tensor("return_num_input_tokens", "bool", optional=True),
    Tensor("return_num_output_tokens", "bool", optional=True),
    Tensor("tau", "float32", (-1,), optional=True),
    Tensor("capacity", "float32", optional=True),
    Tensor("server_statistics", "bool", optional=True),
]
"""What "generate" takes; those of the OpenAI frontend, and what mskip adds."""
GENERATE_OUTPUTS = [
    Tensor("text_output", "string"),
    Tensor("output_ids", "int64", (-1,)),
    Tensor("finish_reason", "string"),
    Tensor("num_input_tokens", "int32"),
    Tensor("num_output_tokens", "int32"),
    Tensor("statistics", "string"),
]


def generate_model(parameters: Mapping[str, str], instances: int) -> Model:
    """Text to text, answer by answer or in a stream; see the served ``model.py``."""
    return Model(
        "generate",
        GENERATE_INPUTS,
        GENERATE_OUTPUTS,
        instances=instances,
        decoupled=True,
        parameters=parameters,
    )


def ensemble_model() -> Model:
    """Plain text in, text out: "tokenizer", then "generate"."""
    steps = [
        {
            "model_name": "tokenizer",
            "model_version": -1,
            "input_map": {"key": "text_input", "value": "text_input"},
            "output_map": {"key": "input_ids", "value": "ids"},
        },
        {
            "model_name": "generate",
            "model_version": -1,
            "input_map": [
                {"key": "input_ids", "value": "ids"},
                {"key": "max_tokens", "value": "max_tokens"},
            ],
            "output_map": [{"key": name, "value": name} for name in ("text_output", "statistics")],
        },
    ]
    return Model(
        "ensemble",
        [Tensor("text_input", "string"), Tensor("max_tokens", "int32")],
        [Tensor("text_output", "string"), Tensor("statistics", "string")],
        backend="",
        extra={"ensemble_scheduling": {"step": steps}},
    )


def lm_model(contract: Contract, backend: str, instances: int, rows: int) -> Model:
    """The graph itself, with the names, dtypes and axes of its contract.

    Its dims name the batch, so ``max_batch_size`` is 0: tau has no batch, and the rows of a routed
    layer's keys and values are not those of the batch.

    Args:
        contract: of the graph.
        backend: which holds it.
        instances: how many.
        rows: of the larger warm-up, for backends that open the graph when they load.
    """
    extra = {} if backend == "python" else {"model_warmup": _warm_up(contract, rows)}
    return Model(
        "lm",
        [_tensor(spec, optional=spec.optional) for spec in contract.inputs()],
        [_tensor(spec) for spec in contract.outputs()],
        backend=backend,
        max_batch_size=0,
        instances=instances,
        extra=extra,
    )


def _tensor(spec: TensorSpec, *, optional: bool = False) -> Tensor:
    return Tensor(spec.name, spec.dtype, dims_of(spec), optional)


def dims_of(spec: TensorSpec) -> list[int]:
    """Triton's dims of a tensor of the contract: -1 for a symbol."""
    return [each if isinstance(each, int) else -1 for each in spec.axes]


def _warm_up(contract: Contract, most: int) -> list[dict[str, Any]]:
    """One new token for 1 and for ``most`` sequences, all executed."""
    made = []
    for rows in sorted({1, most}):
        inputs = []
        for spec in contract.inputs():
            value: dict[str, Any] = {
                "data_type": Word(TYPES[spec.dtype]),
                "dims": _warm_dims(spec, rows),
            }
            if spec.name in WARM_FILES:
                value["input_data_file"] = f"{spec.name}-{rows}"
            else:
                value["zero_data"] = True
            inputs.append({"key": spec.name, "value": value})
        made.append({"name": f"{rows} sequences", "batch_size": 1, "inputs": inputs})
    return made


WARM_FILES = ("attention_mask", "routing")
"""Inputs of the warm-up that zeros would make meaningless."""


def _warm_dims(spec: TensorSpec, rows: int) -> list[int]:
    """Sizes of an input: one position for each sequence."""
    of_rows = ("batch", f"rows_{spec.name.split('.')[1]}" if "." in spec.name else "batch")
    return [rows if each in of_rows else each if isinstance(each, int) else 1 for each in spec.axes]


def warm_up_files(contract: Contract, most: int) -> dict[str, bytes]:
    """What lies in the folder ``warmup`` of "lm", by name."""
    files = {}
    for rows in sorted({1, most}):
        for spec in contract.inputs():
            if spec.name in WARM_FILES:
                array = np.ones(_warm_dims(spec, rows), dtype=spec.dtype)
                if spec.name == "attention_mask":
                    array[:, 1:] = 0
                files[f"{spec.name}-{rows}"] = array.tobytes()
    return files
