"""For which sizes a TensorRT engine is built."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mskip.compressor.errors import MskipError
from mskip.exporters.contract import BATCH, KEPT, SEQUENCE, Contract
from mskip.exporters.onnx_export import CONTEXT

Range = tuple[int, int, int]
"""Least, likeliest and largest size."""
LOGITS = 64
"""Most columns of a prompt whose logits one call gives. One is asked for, but in proofs and scores:
all of a long prompt's would take more memory than the model."""
_NAMES = ("batch", "seq", "context")
_FORM = "--profile 'batch=1,4,8 seq=1,512,2048 context=4096'"


@dataclass(frozen=True)
class Profile:
    """Sizes of calls.

    Attributes:
        batch: sequences.
        sequence: tokens of a prompt; a decoding step has one, in a profile of its own.
        context: positions of a sequence, prompt and answer together; the caches have so many.
    """

    batch: Range = (1, 1, 8)
    sequence: Range = (1, 512, 2048)
    context: int = CONTEXT

    def shapes(self, contract: Contract) -> list[dict[str, list[tuple[int, ...]]]]:
        """Least, likeliest and largest shape of each input that varies, of prefill and decoding."""
        found = []
        for sequence in (self.sequence, (1, 1, 1)):
            kept = 1, 1, min(LOGITS, sequence[2])
            sizes = {BATCH: self.batch, SEQUENCE: sequence, KEPT: kept}
            found.append(
                {
                    spec.name: [
                        tuple(
                            sizes[axis][number] if isinstance(axis, str) else axis
                            for axis in spec.axes
                        )
                        for number in range(3)
                    ]
                    for spec in contract.inputs()
                    if any(isinstance(axis, str) for axis in spec.axes)
                }
            )
        return found


def trtexec_script(contract: Contract, profile: Profile, graph: str, engine: str) -> str:
    """A shell script that builds the engine with TensorRT's own tool where TensorRT is installed.

    Args:
        contract: of the graph.
        profile: as of `mskip export --trt`; each becomes a profile of the tool's.
        graph: its file, beside the script.
        engine: file to write, beside it.
    """
    options = [f"--onnx={graph}", f"--saveEngine={engine}", "--stronglyTyped"]
    for number, shapes in enumerate(profile.shapes(contract)):
        options.append(f"--profile={number}")
        for place, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            sizes = (
                f"{tensor}:{'x'.join(map(str, each[place]))}" for tensor, each in shapes.items()
            )
            options.append(f"--{name}={','.join(sizes)}")
    lines = " \\\n  ".join(options)
    script = ["#!/bin/sh", "# Profile 0 is for prompts, 1 for decoding.", 'cd "$(dirname "$0")"']
    return "\n".join([*script, f'trtexec {lines} "$@"', ""])


def parse_profile(text: str) -> Profile:
    """Read what the command line was given, such as ``batch=1,4,8 seq=1,512,2048 context=4096``.

    One number stands for all three. What is left out keeps its default.

    Raises:
        MskipError: it cannot be read, or its sizes contradict each other.
    """
    given: dict[str, list[int]] = {}
    for part in text.split():
        name, _, values = part.partition("=")
        if name not in _NAMES or not re.fullmatch(r"\d+(,\d+,\d+)?", values) or name in given:
            raise MskipError(f"--profile cannot be read at {part!r}.", f"Write it like {_FORM}.")
        given[name] = [int(value) for value in values.split(",")]
    usual = Profile()
    batch, sequence = _range(given.get("batch"), usual.batch), given.get("seq")
    context = given.get("context", [usual.context])
    if len(context) > 1:
        raise MskipError("--profile takes one number for context.", f"Write it like {_FORM}.")
    (positions,) = context
    least = min(usual.sequence[1], positions), min(usual.sequence[2], positions)
    found = Profile(batch, _range(sequence, (1, *least)), positions)
    for name, (low, middle, high) in (("batch", found.batch), ("seq", found.sequence)):
        if not 1 <= low <= middle <= high:
            raise MskipError(
                f"--profile has {name}={low},{middle},{high}: sizes have to rise from at least 1.",
                f"Write it like {_FORM}.",
            )
    if found.sequence[2] > positions:
        raise MskipError(
            f"--profile has prompts of {found.sequence[2]} tokens, but a context of {positions}.",
            "Give a larger context.",
        )
    return found


def _range(values: list[int] | None, usual: Range) -> Range:
    if values is None:
        return usual
    low, middle, high = values if len(values) == 3 else values * 3
    return low, middle, high
