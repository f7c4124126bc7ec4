"""Base models: where they come from, how they are loaded and recognised again.

Weights are read from safetensors only. A name is a hub id, a folder, or that of
an embedded model; see `mskip.compressor.embedded`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mskip.compressor.embedded import (
    EMBEDDED,
    PREFIX,
    cache_home,
    embedded_folder,
    no_bars,
)
from mskip.compressor.errors import ModelError
from mskip.compressor.families import Family, register, require_parts
from mskip.compressor.files import sha256
from mskip.compressor.recipe import FamilySpec, ModelSpec
from mskip.compressor.sublayers import Granularity

__all__ = [
    "EMBEDDED",
    "BaseModel",
    "cache_home",
    "device_of",
    "embedded_folder",
    "family_entries",
    "family_from",
    "folder_sha256",
    "load_base",
    "load_config",
    "load_tokenizer",
    "model_folder",
    "text_entries",
]

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: the causal LM in evaluation mode, frozen.
        tokenizer: its tokenizer; has a pad token.
        folder: the local folder it was read from.
        sha256: hash over its configuration and weight files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    sha256: str


def _hub_folder(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _HUB_FILES if spec.trust_remote_code else _HUB_FILES[:-1]
    try:
        return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"'{spec.name}' is neither a folder nor a model that the hub gives: {reason}",
            "Check the name and the network (gated models need `hf auth login`), "
            "or give a folder with config.json and *.safetensors.",
        ) from error


def model_folder(spec: ModelSpec) -> Path:
    """Local folder of a base model; downloads or converts it if need be.

    Raises:
        ModelError: it cannot be had, or holds no safetensors weights.
    """
    if spec.name.startswith(PREFIX):
        return embedded_folder(spec.name)
    folder = Path(spec.name).expanduser()
    if not folder.is_dir():
        if folder.exists() or spec.name.startswith((".", "/", "~")):
            raise ModelError(f"model folder {folder} does not exist or is not a folder.")
        folder = _hub_folder(spec)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: not a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors weights; pickled weights are never loaded.",
            "Convert it: load it with transformers and save_pretrained() it.",
        )
    return folder


def folder_sha256(folder: Path) -> str:
    """Hash over names and contents of config.json and the weight files."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}:{sha256(path)}\n".encode())
    return digest.hexdigest()


def text_entries(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """A model folder's configuration, of the text part where there are several.

    Sizes are under Llama's names whatever the architecture calls them: ``hidden_size``,
    ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size``, ``vocab_size``.

    Raises:
        ModelError: it is missing, damaged, or of no architecture that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = config.get_text_config()
        entries: dict[str, Any] = config.to_dict()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            entries[name] = int(getattr(config, name))
        inner = next(
            (size for name in _INNER if (size := getattr(config, name, None)) is not None), None
        )
        # GPT-2's file says nothing where it is what it was in the first Transformer.
        entries["intermediate_size"] = 4 * entries["hidden_size"] if inner is None else int(inner)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder / 'config.json'} is damaged or unknown: {reason}") from error
    return entries


_INNER = ("intermediate_size", "ffn_hidden_size", "n_inner")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token.

    Raises:
        ModelError: the folder has no usable tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer in {folder}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def family_from(spec: FamilySpec) -> Family:
    """The row that a recipe brings."""
    entries = spec.model_dump()
    listed = {key: tuple(value) for key, value in entries.items() if isinstance(value, list)}
    sets = {key: frozenset(entries[key]) for key in ("layer_types", "granularities")}
    return Family(**{**entries, **listed, **sets})


def family_entries(family: Family) -> dict[str, Any]:
    """What a recipe says to bring a row: its fields that differ from the defaults."""
    entries = asdict(family)
    entries["layer_types"] = sorted(family.layer_types)
    entries["granularities"] = [k for k in get_args(Granularity) if k in family.granularities]
    for key, value in entries.items():
        if isinstance(value, tuple):
            entries[key] = list(value)
    return FamilySpec.model_validate(entries).model_dump(exclude_defaults=True)


def load_config(spec: ModelSpec) -> Any:
    """A base model's configuration, without its weights.

    Raises:
        ModelError: it cannot be had, is damaged, or is of an architecture that transformers
            does not know and whose code is not trusted.
    """
    place: str | Path = Path(spec.name).expanduser()
    if spec.name.startswith(PREFIX):
        place = embedded_folder(spec.name)
    elif not Path(place).exists():
        if spec.name.startswith((".", "/", "~")):
            raise ModelError(f"model folder {place} does not exist.")
        place = spec.name
    elif not (Path(place) / "config.json").is_file():
        raise ModelError(f"{place} has no config.json: not a Hugging Face model folder.")
    try:
        return AutoConfig.from_pretrained(
            place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the configuration of '{spec.name}' cannot be read: {reason}",
            "Check the name and the network (gated models need `hf auth login`). An architecture "
            "that brings its own code needs trust_remote_code.",
        ) from error


def load_base(spec: ModelSpec) -> BaseModel:
    """Load a base model, frozen and in evaluation mode; registers the row that ``spec`` brings.

    Raises:
        ModelError: see `model_folder`; also weights that are corrupt, or a row that is of another
            architecture, stands against a built-in one, or names what the model does not have.
    """
    row = None if spec.family is None else family_from(spec.family)
    if row is not None:
        register(row)
    folder = model_folder(spec)
    options: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "use_safetensors": True,
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    if row is not None:
        _require_row(model, row)
    # Layers that are to be spread over processes go to their devices in parts.
    if spec.device_map is None and not spec.shard:
        model.to(device=device_of(spec))  # type: ignore[call-arg]
    model.requires_grad_(False)
    model.eval()
    tokenizer = load_tokenizer(folder, trust_remote_code=spec.trust_remote_code)
    return BaseModel(model, tokenizer, folder, folder_sha256(folder))


def _require_row(model: PreTrainedModel, row: Family) -> None:
    if row.model_type != model.config.model_type:
        raise ModelError(
            f"model.family is a row of '{row.model_type}'; the model is a "
            f"'{model.config.model_type}'.",
            "Take it from the recipe, or correct its model_type.",
        )
    require_parts(model, row)


def device_of(spec: ModelSpec) -> torch.device:
    """Where a model goes that is not spread over several devices.

    Raises:
        ModelError: no such device here.
    """
    if spec.device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # `accelerate launch` gives every process a GPU of its own.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(spec.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.device = {spec.device!r} cannot be used: {reason}", "Set it to auto or cpu."
        ) from error
    return device
