"""Rows proposed from a model, small copies of models, and rows that a recipe brings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from architectures import MODELS, make, row_of
from pydantic import ValidationError

from mskip.compressor import families
from mskip.compressor.detection import detect
from mskip.compressor.errors import ModelError, RecipeError
from mskip.compressor.families import FAMILIES, Family, family_of, register, registered
from mskip.compressor.models import family_entries, family_from, load_base, load_config
from mskip.compressor.proof import prove
from mskip.compressor.recipe import FamilySpec, ModelSpec, load_recipe
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip
from mskip.compressor.tiny import tiny_copy

PHI = Family("phi", mlp_norm="input_layernorm", final_norm="model.final_layernorm")
OPT = Family(
    "opt",
    layers="model.decoder.layers",
    attention_norm="self_attn_layer_norm",
    mlp="fc2",
    mlp_norm="final_layer_norm",
    final_norm="model.decoder.final_layer_norm",
    granularities=frozenset({"attention", "block"}),
)


@pytest.fixture(autouse=True)
def _no_rows_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})


# -- rows that are known ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_built_in_rows_are_found_again(name: str) -> None:
    """All but what other configurations do: switches, and the first of several names."""
    model = make(name)
    found, row = detect(model), FAMILIES[row_of(name)]
    for field in dataclasses.fields(Family):
        one, built_in = getattr(found, field.name), getattr(row, field.name)
        if field.name == "layer_types":
            assert one <= built_in
        elif field.name in ("attention_norm", "mlp_norm") and isinstance(built_in, tuple):
            assert one in built_in
        elif field.name not in ("on", "off"):
            assert one == built_in, field.name


def test_a_switch_that_moves_the_norm_is_seen() -> None:
    assert detect(make("stablelm")).mlp_norm == "post_attention_layernorm"
    assert detect(make("stablelm, parallel")).mlp_norm == "input_layernorm"
    assert detect(make("falcon")).attention_norm == "ln_attn"
    assert detect(make("falcon, one norm")).attention_norm == "input_layernorm"


def test_detecting_leaves_no_hooks() -> None:
    model = make("llama")
    detect(model)
    assert not any(each._forward_hooks for each in model.modules())


# -- rows that are not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ("PhiConfig", PHI),
        ("OPTConfig", OPT),
        ("Starcoder2Config", Family("starcoder2")),
        (
            "GPTJConfig",
            Family(
                "gptj",
                layers="transformer.h",
                attention="attn",
                attention_norm="ln_1",
                mlp_norm="ln_1",
                cache="layer_past",
                layer_gives_tuple=True,
                final_norm="transformer.ln_f",
            ),
        ),
    ],
)
def test_rows_of_unknown_architectures_are_found_and_proven(config: str, row: Family) -> None:
    model = tiny_copy(getattr(transformers, config)())
    assert model.config.model_type not in FAMILIES
    found = detect(model)
    assert found == row
    for kind in sorted(found.granularities):
        failed = [check for check in prove(model, found, kind) if not check.passed]
        assert not failed


def test_experts_are_left_alone() -> None:
    model = tiny_copy(transformers.OlmoeConfig())
    assert detect(model).granularities == {"attention"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.OPTConfig(do_layer_norm_before=False), "norm of the residual stream itself"),
        (transformers.OPTConfig(word_embed_proj_dim=64), "no final norm is found"),
        (transformers.BloomConfig(), "is not its input plus what"),
        (transformers.MptConfig(), "takes the cache as layer_past, its attention as"),
        (transformers.T5Config(), "an encoder-decoder"),
        (transformers.MambaConfig(num_hidden_layers=2), "layers of linear_attention"),
        (transformers.BertConfig(), "hand the cache to one attention module"),
    ],
    ids=lambda value: getattr(value, "model_type", "") or None,
)
def test_what_a_row_cannot_say_is_refused(config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        detect(tiny_copy(config))


def test_an_encoder_decoder_is_refused_as_a_model_too() -> None:
    model = make("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="an encoder-decoder"):
        detect(model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: setattr(m.config, "num_hidden_layers", 7), "no list of 7 equal decoder layers"),
        (
            lambda m: m.model.layers[3].register_forward_hook(lambda _, __, out: out * 2),
            "is not its input plus what self_attn and mlp give",
        ),
        (
            lambda m: m.register_forward_hook(lambda _, __, out: _doubled(out)),
            "the logits of 'llama' are not what its head gives",
        ),
        (lambda m: m.register_forward_pre_hook(_failing), "does not take token ids"),
    ],
)
def test_a_model_that_does_something_else_is_refused(
    spoil: Callable[[Any], Any], words: str
) -> None:
    model = make("llama")
    spoil(model)
    with pytest.raises(ModelError, match=words):
        detect(model)


def _doubled(output: Any) -> Any:
    output.logits = output.logits * 2
    return output


def _failing(*_: Any) -> None:
    raise TypeError("no such argument")


# -- small copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_small_and_as_right_as_the_model(name: str) -> None:
    config = MODELS[name].configuration()
    found = detect(tiny_copy(config))
    model = make(name)
    assert found == detect(model)
    assert family_of(tiny_copy(config)) is family_of(model)


def test_a_copy_keeps_switches_and_a_layer_or_two_of_each_kind() -> None:
    config = transformers.Gemma3TextConfig(sliding_window=512, final_logit_softcapping=7.0)
    before = copy.deepcopy(config.to_dict())
    model = tiny_copy(config)
    assert config.to_dict() == before
    small = model.config
    assert small.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert (small.sliding_window, small.final_logit_softcapping) == (4, 7.0)
    assert small.query_pre_attn_scalar == config.query_pre_attn_scalar
    assert small.vocab_size <= 128
    assert model.num_parameters() < 200_000
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Norms and biases would hide a wrong one where they are ones and zeros.
    assert float(model.model.layers[0].input_layernorm.weight.std()) > 0.1


def test_the_same_seed_gives_the_same_copy() -> None:
    one, two, other = (tiny_copy(transformers.PhiConfig(), seed=seed) for seed in (0, 0, 1))
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_window_that_is_not_in_use_stays() -> None:
    config = transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096)
    assert tiny_copy(config).config.sliding_window in (None, 4096)


def test_rotary_factors_are_as_many_as_there_are_channels() -> None:
    config = transformers.Phi3Config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        }
    )
    small = tiny_copy(config).config
    assert small.hidden_size == 32
    assert len(small.rope_parameters["short_factor"]) == 4


def test_widths_are_what_the_code_runs_with() -> None:
    """0.4 of 8 channels is an odd number, which cannot be rotated; 0.4 of 16 is even."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    assert tiny_copy(transformers.PhiConfig(rope_parameters=rope)).config.hidden_size == 64


class StubbornConfig(transformers.LlamaConfig):
    model_type = "stubborn"


class StubbornForCausalLM(transformers.LlamaForCausalLM):
    config_class = StubbornConfig

    def __init__(self, config: StubbornConfig) -> None:
        if config.hidden_size != config.asked_for:
            raise ValueError(f"no width but {config.asked_for}.")
        super().__init__(config)


transformers.AutoConfig.register("stubborn", StubbornConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(StubbornConfig, StubbornForCausalLM, exist_ok=True)


def test_widths_stay_where_they_cannot_be_shrunk() -> None:
    options = {"num_attention_heads": 3, "num_hidden_layers": 9, "intermediate_size": 64}
    small = tiny_copy(StubbornConfig(hidden_size=96, asked_for=96, **options)).config
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (96, 3, 64)
    assert (small.num_hidden_layers, small.vocab_size) == (4, 128)
    with pytest.raises(ModelError, match=r"no small copy .* ValueError: no width but 5\."):
        tiny_copy(StubbornConfig(hidden_size=96, asked_for=5, **options))


def test_a_copy_that_would_be_large_is_not_made() -> None:
    config = StubbornConfig(hidden_size=1 << 15, asked_for=1 << 15, intermediate_size=1 << 17)
    with pytest.raises(ModelError, match=r"no width but 32768\.; .* it takes \d+ GiB"):
        tiny_copy(config)


def test_what_has_no_copy_is_refused() -> None:
    with pytest.raises(ModelError, match="no small copy of a 'vit' model runs"):
        tiny_copy(transformers.ViTConfig())
    with pytest.raises(ModelError, match="made of several models"):
        tiny_copy(transformers.Gemma3Config())


# -- rows that users bring --------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi_folder(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]
) -> Iterator[Path]:
    """A model folder of an architecture without a row."""
    folder = tmp_path_factory.mktemp("models") / "phi"
    tiny_copy(transformers.PhiConfig()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def spec_of(folder: Path, **family: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": str(folder), "family": family})


def test_a_registered_row_is_found_and_goes_with_its_block() -> None:
    model = tiny_copy(transformers.PhiConfig())
    with pytest.raises(ModelError, match="'phi' is not supported") as refused:
        family_of(model)
    assert "mskip doctor --model" in refused.value.remedy
    with registered(PHI):
        assert family_of(model) is PHI
    with pytest.raises(ModelError, match="'phi' is not supported"):
        family_of(model)
    register(PHI)
    assert family_of(model) is PHI


def test_a_registered_row_keeps_its_conditions() -> None:
    model = tiny_copy(transformers.PhiConfig())
    model.config.some_switch = True
    with (
        registered(dataclasses.replace(PHI, off=("some_switch",))),
        pytest.raises(ModelError, match="configured with some_switch"),
    ):
        family_of(model)


def test_a_built_in_row_is_not_replaced() -> None:
    register(FAMILIES["gemma2"])
    other = dataclasses.replace(FAMILIES["gemma2"], mlp_post_norm=None)
    with pytest.raises(ModelError, match="'gemma2' has a built-in row"):
        register(other)
    with pytest.raises(ModelError, match="'gemma2' has a built-in row"), registered(other):
        pass


def test_a_recipe_says_what_a_row_says() -> None:
    fields = {field.name: field for field in dataclasses.fields(Family)}
    assert list(FamilySpec.model_fields) == list(fields)
    assert family_from(FamilySpec(model_type="x")) == Family("x")
    for row in (*FAMILIES.values(), PHI, OPT):
        entries = family_entries(row)
        assert family_from(FamilySpec.model_validate(entries)) == row
        assert yaml.safe_load(yaml.safe_dump(entries)) == entries


def recipe(tmp_path: Path, family: str) -> Any:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nmodel:\n  name: x\n  family: {family}\n")
    return load_recipe(str(path))


def test_a_row_in_a_recipe(tmp_path: Path) -> None:
    words = "{model_type: x, mlp_norm: [a, b], on: [switch], off: [other]}"
    row = family_from(recipe(tmp_path, words).model.family)
    assert row == Family("x", mlp_norm=("a", "b"), on=("switch",), off=("other",))
    assert recipe(tmp_path, "null").model.family is None


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("{model_type: x, atention: y}", r"unknown key 'model.family.atention'; a row has: model_"),
        ("{attention: y}", r"'model.family.model_type' is missing"),
        ("{model_type: x, layer_types: [odd]}", r"'full_attention' or 'sliding_attention'"),
        ("{model_type: x, granularities: [head]}", r"'attention', 'mlp' or 'block'"),
        ("{model_type: x, layers: 3}", r"'model.family.layers' is 3, it should be a"),
        ("phi", r"'model.family' is 'phi', it should be a mapping of keys"),
    ],
)
def test_faults_of_a_row_in_a_recipe(tmp_path: Path, family: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(tmp_path, family)


def test_a_row_is_checked_without_a_file_too() -> None:
    with pytest.raises(ValidationError):
        FamilySpec.model_validate({"model_type": "x", "cach": "y"})


def test_a_model_is_loaded_with_its_row_and_routed(phi_folder: Path) -> None:
    model = load_base(spec_of(phi_folder, **family_entries(PHI))).model
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        dense = model(ids).logits
        with MindSkip(model, Routers([1, 2], model.config.hidden_size), tau=1.1):
            assert not torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ({"model_type": "llama", "cache": "x"}, "'llama' has a built-in row"),
        ({"model_type": "opt"}, "is a row of 'opt'; the model is a 'phi'"),
        ({"model_type": "phi"}, "does not have: final_norm = 'model.norm'"),
        (
            {**family_entries(PHI), "attention": "attn", "mlp_norm": ["a", "b"]},
            r"attention = 'attn', mlp_norm = \('a', 'b'\)",
        ),
    ],
)
def test_a_row_that_is_not_the_models_is_refused(
    phi_folder: Path, family: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        load_base(spec_of(phi_folder, **family))


def test_a_built_in_row_may_be_repeated(tiny_folder: Path) -> None:
    base = load_base(spec_of(tiny_folder, **family_entries(FAMILIES["llama"])))
    assert family_of(base.model) is FAMILIES["llama"]


def test_configurations_are_loaded_without_weights(phi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((phi_folder / "config.json").read_bytes())
    assert load_config(ModelSpec(name=str(tmp_path))).model_type == "phi"
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_config(ModelSpec(name=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_config(ModelSpec(name=str(tmp_path)))
    with pytest.raises(ModelError, match="does not exist"):
        load_config(ModelSpec(name=str(tmp_path / "nowhere")))
