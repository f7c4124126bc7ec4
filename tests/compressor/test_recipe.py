"""Recipes: what ships, what is refused and with which words, and the way to YAML and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mskip.compressor.errors import RecipeError
from mskip.compressor.recipe import (
    ModelSpec,
    Recipe,
    RouterSpec,
    RoutingSpec,
    TuningSpec,
    dump_recipe,
    load_recipe,
    recipe_schema,
    shipped_recipes,
)

LAYERS = {"llama-3-8b": 32, "mistral-7b": 32, "qwen2.5-7b": 28, "smollm2-135m": 30}
SMALL = "name: small\nmodel:\n  name: folder\n"

Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe file and give its path."""

    def to_file(text: str | bytes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return to_file


def fault(name_or_path: str, *overrides: str) -> str:
    """The whole text of the error that loading gives."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    return str(caught.value)


# What ships


def test_shipped_recipes_are_listed_in_order() -> None:
    assert shipped_recipes() == sorted(LAYERS)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_shipped_recipe_loads_fits_its_model_and_comes_back(name: str, write: Write) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.routing.capacity == 0.5
    routed = recipe.routing.routed_layers(LAYERS[name])
    if recipe.routing.choose == "last":
        assert routed == list(range(LAYERS[name] - 1 - len(routed), LAYERS[name] - 1))
    assert len(routed) == (14 if name.startswith("qwen") else 16)
    assert (recipe.tuning.relaxation, recipe.tuning.constraint) == ("concrete", "multiplier")
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_the_demo_is_embedded_and_routes_the_least_harmful_half() -> None:
    recipe = load_recipe("smollm2-135m")
    assert recipe.model == ModelSpec(name="embedded:smollm2-135m")
    assert recipe.data.source == "embedded:prompts"
    assert recipe.router == RouterSpec(sensitivity_prompts=12)
    assert recipe.routing.capacity == 0.5
    assert recipe.compensation.rank == 64
    assert recipe.validation.prompts >= 32
    assert recipe.data.held_out >= recipe.validation.prompts
    assert recipe.routing.choose == "least_harmful"
    assert recipe.routing.candidates(30) == list(range(29))
    assert len(recipe.routing.routed_layers(30)) == 16


def test_llama_has_the_settings_of_the_paper() -> None:
    recipe = load_recipe("llama-3-8b")
    tuning, data = recipe.tuning, recipe.data
    assert recipe.model.dtype == "bfloat16"
    assert (recipe.router.bias, recipe.router.normalize, recipe.router.init) == (
        False,
        False,
        "zeros",
    )
    assert tuning.batch_size * tuning.gradient_accumulation == 64
    assert (tuning.loss, tuning.epochs, tuning.learning_rate) == ("lm", 1, 1e-5)
    assert (tuning.lr_scheduler, tuning.warmup_ratio, tuning.weight_decay) == ("cosine", 0.03, 0)
    assert (tuning.max_length, tuning.bf16) == (2048, True)
    assert (data.source, data.max_samples) == ("tatsu-lab/alpaca", 1000)


def test_importing_brings_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mskip.compressor.recipe as r; r.load_recipe('smollm2-135m');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Files


def test_a_file_needs_only_name_and_model(write: Write) -> None:
    assert load_recipe(write(SMALL)) == Recipe(name="small", model=ModelSpec(name="folder"))


def test_a_shipped_name_goes_before_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2-135m").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("smollm2-135m").name == "smollm2-135m"
    assert load_recipe("./smollm2-135m").name == "small"


def test_a_missing_file_lists_the_shipped_recipes() -> None:
    assert fault("smollm") == (
        "cannot read recipe 'smollm': No such file or directory.\n"
        "Give a YAML file, or a shipped recipe: "
        "llama-3-8b, mistral-7b, qwen2.5-7b, smollm2-135m."
    )


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert f"cannot read recipe '{tmp_path}': Is a directory." in fault(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmodel: [\n", "YAML error in line 3: expected the node content"),
        ("name: a\n\tmodel: b\n", "YAML error in line 2: found character '\\t'"),
        ("name: a\n---\nname: b\n", "YAML error in line 2: but found another document"),
        ("name: a\n? [1]\n: 2\n", "YAML error in line 2: found unhashable key"),
        ("name: a\nname: b\n", "YAML error in line 2: repeated key name."),
        (SMALL + "tuning:\n  seed: 1\n  seed: 1\n", "YAML error in line 6: repeated key seed."),
        ("name: a\n'name': b\n", "YAML error in line 2: repeated key name."),
        ("name: !!python/name:os.system\n", "YAML error in line 1: could not determine a"),
        ("name: !!bool maybe\n", "YAML error: 'maybe'."),
        ("name: 2024-13-45\n", "YAML error: month must be in 1..12."),
        (b"name: \xff\xfe\n", "YAML error: 'utf-8' codec can't decode"),
        ("name: " + "[" * 1000, "YAML error: maximum recursion depth exceeded"),
        ("", "the top level is not a mapping of keys"),
        ("- name: a\n", "the top level is not a mapping of keys"),
        ("just text\n", "the top level is not a mapping of keys"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(text: str | bytes, message: str, write: Write) -> None:
    if isinstance(text, bytes):
        message = "YAML error: "  # the wording is Python's
    path = write(text)
    assert fault(path).startswith(f"recipe '{path}': {message}")


def test_anchors_and_merge_keys_are_no_repetition(write: Write) -> None:
    text = "data: &data {seed: 3}\n" + SMALL + "calibration: {}\ntuning: {<<: *data, epochs: 1}\n"
    recipe = load_recipe(write(text), ["data.seed=4"])
    assert (recipe.data.seed, recipe.tuning.seed) == (4, 3)


# Keys and values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.epoch=1", "unknown key 'tuning.epoch', did you mean 'tuning.epochs'?"),
        ("tunning={}", "unknown key 'tunning', did you mean 'tuning'?"),
        ("capacity=0.3", "unknown key 'capacity', did you mean 'routing.capacity'?"),
        (
            "validation.limit.token_match=1",
            "unknown key 'validation.limit', did you mean 'validation.limits'?",
        ),
        (
            "validation.limits.tokenmatch=1",
            "unknown key 'validation.limits.tokenmatch', "
            "did you mean 'validation.limits.token_match'?",
        ),
        ("qqq=1", "unknown key 'qqq'"),
        ("=1", "unknown key ''"),
        ("routing={1: 2}", "unknown key 'routing[1]'"),
        ("name=", "'name' is None, it should be a string, in quotes"),
        ("model.revision=123", "'model.revision' is 123, it should be a string, in quotes"),
        ("model.name=''", "'model.name' is '', it should have at least 1 character"),
        ("name=../a", "'name' is '../a', it should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"),
        ("model.dtype=int8", "it should be 'float32', 'bfloat16' or 'float16'"),
        ("model=folder", "'model' is 'folder', it should be a mapping of keys"),
        ("tuning=", "'tuning' is None, it should be a mapping of keys"),
        ("routing.layers=13", "'routing.layers' is 13, it should be a valid list"),
        ("routing.layers=[]", "'routing.layers' is [], it should have at least 1 item"),
        ("routing.layers=[3, -1]", "'routing.layers[1]' is -1, it should be greater than or equal"),
        ("routing.layers=[3, 3]", "'routing.layers' is [3, 3], it should have no repeats"),
        ("routing.capacity=1.01", "'routing.capacity' is 1.01, it should be less than or equal"),
        ("routing.capacity=true", "'routing.capacity' is True, it should be a valid number"),
        ("routing.capacity='0.5'", "'routing.capacity' is '0.5', it should be a valid number"),
        (
            "routing.granularity=head",
            "'routing.granularity' is 'head', it should be 'attention', 'mlp' or 'block'",
        ),
        ("routing.last=0", "'routing.last' is 0, it should be greater than or equal to 1"),
        ("router.bias=1", "'router.bias' is 1, it should be a valid boolean"),
        ("tuning.batch_size=8.0", "'tuning.batch_size' is 8.0, it should be a valid integer"),
        ("tuning.learning_rate=0", "'tuning.learning_rate' is 0, it should be greater than 0"),
        ("tuning.learning_rate=.inf", "'tuning.learning_rate' is inf, it should be a finite"),
        ("tuning.temperature=.nan", "'tuning.temperature' is nan, it should be a finite number"),
        ("tuning.max_steps=-2", "'tuning.max_steps' is -2, it should be greater than or equal"),
        ("tuning.lr_scheduler=cosin", "'tuning.lr_scheduler' is 'cosin', it should be 'linear',"),
        ("tuning.seed=4294967296", "it should be less than 4294967296"),
        ("data.max_samples=0", "'data.max_samples' is 0, it should be greater than or equal to 1"),
        ("export.opset=17", "'export.opset' is 17, it should be greater than or equal to 18"),
        ("export.opset=25", "'export.opset' is 25, it should be less than or equal to 23"),
        ("validation.prompts=0", "it should be greater than or equal to 1"),
        ("bench.batches=[1, x]", "'bench.batches[1]' is 'x', it should be a valid integer"),
        ("name.part=x", "'name' is {'part': 'x'}, it should be a string, in quotes"),
        ("tuning.epochs", "override 'tuning.epochs' has no '=': write key.sub=value"),
        ("tuning.epochs=[", "override 'tuning.epochs=[': YAML error in line 1: expected the node"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, message: str) -> None:
    lines = fault("smollm2-135m", override).splitlines()
    assert lines[0] == "recipe 'smollm2-135m':"
    assert len(lines) == 2
    assert message in lines[1]


def test_a_missing_key_is_named(write: Write) -> None:
    path = write("model: {}\n")
    assert fault(path) == f"recipe '{path}':\n  'name' is missing\n  'model.name' is missing"


def test_all_faults_are_listed_at_once(write: Write) -> None:
    path = write(SMALL + "routing: {capacity: 2}\ntuning: {epoch: 1}\n")
    assert fault(path, "seed", "bench.repeats=none").splitlines() == [
        f"recipe '{path}':",
        "  override 'seed' has no '=': write key.sub=value",
        "  'routing.capacity' is 2, it should be less than or equal to 1",
        "  unknown key 'tuning.epoch', did you mean 'tuning.epochs'?",
        "  'bench.repeats' is 'none', it should be a valid integer",
    ]


def test_a_long_value_is_cut(write: Write) -> None:
    assert len(fault("smollm2-135m", f"tuning.loss={'x' * 5000}")) < 200


# Overrides


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("tuning.learning_rate=1e-5", lambda r: r.tuning.learning_rate, 1e-5),
        ("tuning.learning_rate=2E-5", lambda r: r.tuning.learning_rate, 2e-5),
        ("tuning.epochs=2", lambda r: r.tuning.epochs, 2.0),
        (" tuning.bf16 = true", lambda r: r.tuning.bf16, True),
        ("routing.layers=[5, 3]", lambda r: r.routing.layers, [5, 3]),
        ("model.revision=a=b", lambda r: r.model.revision, "a=b"),
        ("model.revision='123'", lambda r: r.model.revision, "123"),
        ("bench.threads=", lambda r: r.bench.threads, None),
        ("validation.limits.token_match=0.5", lambda r: r.validation.limits.token_match, 0.5),
        ("routing={last: 4}", lambda r: (r.routing.last, r.routing.exclude_last), (4, 1)),
    ],
)
def test_an_override_sets_one_value(
    override: str, get: Callable[[Recipe], Any], expected: Any
) -> None:
    assert get(load_recipe("smollm2-135m", [override])) == expected


def test_the_last_override_wins_and_others_stay() -> None:
    recipe = load_recipe("llama-3-8b", ["tuning.seed=1", "tuning.epochs=2", "tuning.seed=2"])
    assert (recipe.tuning.seed, recipe.tuning.epochs, recipe.tuning.loss) == (2, 2.0, "lm")


def test_an_override_fills_an_empty_section(write: Write) -> None:
    assert load_recipe(write(SMALL + "tuning:\n"), ["tuning.seed=7"]).tuning.seed == 7


# Which layers


@pytest.mark.parametrize(
    ("routing", "layers", "expected"),
    [
        (RoutingSpec(), 30, list(range(13, 29))),
        (RoutingSpec(), 17, list(range(16))),
        (RoutingSpec(last=2, exclude_last=0), 4, [2, 3]),
        (RoutingSpec(last=1, exclude_last=3), 4, [0]),
        (RoutingSpec(layers=[5, 0, 3]), 6, [0, 3, 5]),
    ],
)
def test_routed_layers(routing: RoutingSpec, layers: int, expected: list[int]) -> None:
    assert routing.routed_layers(layers) == expected


@pytest.mark.parametrize(
    ("routing", "layers", "message"),
    [
        (RoutingSpec(), 16, "routing.last = 16, routing.exclude_last = 1: the model has only 16"),
        (RoutingSpec(last=1, exclude_last=4), 4, "routing.last = 1, routing.exclude_last = 4: "),
        (RoutingSpec(exclude_last=9), 4, "routing.last = 16, routing.exclude_last = 9: "),
        (RoutingSpec(layers=[7, 2]), 7, "routing.layers = [7, 2]: the model has only 7 layers"),
    ],
)
def test_layers_that_do_not_fit_name_the_key(
    routing: RoutingSpec, layers: int, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        routing.routed_layers(layers)
    assert str(caught.value).startswith(message)


@given(last=st.integers(1, 40), exclude=st.integers(0, 40), layers=st.integers(1, 80))
def test_last_layers_are_whole_or_refused(last: int, exclude: int, layers: int) -> None:
    routing = RoutingSpec(last=last, exclude_last=exclude)
    if last + exclude > layers:
        with pytest.raises(RecipeError):
            routing.routed_layers(layers)
    else:
        routed = routing.routed_layers(layers)
        assert len(routed) == last
        assert routed[-1] == layers - 1 - exclude
        assert routed[0] >= 0


# The models


def test_recipes_are_frozen_and_do_not_share_lists() -> None:
    one, two = (Recipe(name="a", model=ModelSpec(name="b")) for _ in range(2))
    with pytest.raises(ValidationError, match="frozen"):
        one.tuning.seed = 1
    one.bench.batches.append(9)
    assert two.bench.batches == [1, 8]


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of the schema with what it says, as ``Model.key``."""
    for model in ({"title": "Recipe", **schema}, *schema["$defs"].values()):
        for key, value in model["properties"].items():
            yield f"{model['title']}.{key}", value


def test_the_schema_is_json_and_describes_everything() -> None:
    schema = recipe_schema()
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["name", "model"]
    for model in (schema, *schema["$defs"].values()):
        assert model["description"]
        assert model["additionalProperties"] is False
    assert [key for key, value in properties(schema) if not value.get("description")] == []


def test_the_schema_states_ranges_in_words_and_in_keywords() -> None:
    for key, value in properties(recipe_schema()):
        for kind in value.get("anyOf", [value]):
            number = kind.get("items", kind)
            if number.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(number), key
                assert any(sign in value["description"] for sign in (">", "..", "from 0")), key


def from_schema(schema: dict[str, Any], defs: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema allows; the keys that are not required may be left out."""
    if "$ref" in schema:
        return from_schema(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema:
        return st.one_of([from_schema(each, defs) for each in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    kinds: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "null": st.none,
        "boolean": st.booleans,
        "integer": lambda: st.integers(low, high if below is None else below - 1),
        "number": lambda: st.floats(
            low if above is None else above,
            high,
            exclude_min=above is not None,
            allow_nan=False,
            allow_infinity=False,
        ),
        "string": lambda: (
            st.from_regex(schema["pattern"], fullmatch=True).filter(lambda s: len(s) <= 100)
            if "pattern" in schema
            else st.text(min_size=schema.get("minLength", 0), max_size=12)
        ),
        "array": lambda: st.lists(
            from_schema(schema["items"], defs),
            min_size=schema.get("minItems", 0),
            max_size=4,
            unique=schema.get("uniqueItems", False),
        ),
        "object": lambda: (
            st.dictionaries(
                st.text(max_size=8), from_schema(schema["additionalProperties"], defs), max_size=3
            )
            if "properties" not in schema
            else st.fixed_dictionaries(
                {key: from_schema(schema["properties"][key], defs) for key in schema["required"]}
                if "required" in schema
                else {},
                optional={
                    key: from_schema(value, defs)
                    for key, value in schema["properties"].items()
                    if key not in schema.get("required", [])
                },
            )
        ),
    }
    return kinds[schema["type"]]()


SCHEMA = recipe_schema()


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tree=from_schema(SCHEMA, SCHEMA["$defs"]))
def test_what_the_schema_allows_loads_and_comes_back(tree: dict[str, Any], write: Write) -> None:
    recipe = Recipe.model_validate(tree)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("text", ["1e5", "1e-5", "12", "null", "yes", "a: b", "# x", "ü\n", "\x85"])
def test_text_that_looks_like_something_else_comes_back(text: str, write: Write) -> None:
    recipe = Recipe(name="a", model=ModelSpec(name="b", revision=text))
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_the_dump_names_every_key_in_the_models_order() -> None:
    tree = yaml.safe_load(dump_recipe(load_recipe("smollm2-135m")))
    assert list(tree) == list(Recipe.model_fields)
    assert list(tree["tuning"]) == list(TuningSpec.model_fields)
