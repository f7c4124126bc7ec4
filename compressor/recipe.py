"""The recipe: every setting of a run, checked before anything heavy is loaded.

A YAML mapping, one section a concern. Unknown keys are refused and types are strict: "8" is no
number, 1 no boolean. Numbers follow the paper (arXiv 2410.13184) where the shipped recipe says so.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mskip.compressor.errors import RecipeError
from mskip.compressor.sublayers import Granularity, Unit

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy accepts
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNeg = Annotated[float, Field(ge=0)]
Layers = Annotated[list[Index], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Part = Annotated[str, Field(min_length=1)]
Parts = Part | Annotated[list[Part], Field(min_length=1)]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "polynomial", "constant", "constant_with_warmup"
]


def _key(default: Any, description: str, **limits: Any) -> Any:
    """`Field` with its arguments short enough for one line a key."""
    return Field(default=default, description=description, **limits)


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FamilySpec(_Spec):
    """A row for an architecture that has none: what `mskip doctor --model X` prints."""

    model_type: Part = Field(description="model_type in the model's config.json.")
    layers: Part = _key("model.layers", "Path of the list of decoder layers.")
    attention: Part = _key("self_attn", "Attention, within a layer.")
    attention_norm: Parts | None = _key(
        "input_layernorm", "Norm before the attention, or several: the first there is; or null."
    )
    attention_post_norm: Part | None = _key(None, "Norm between attention and residual stream.")
    mlp: Part = _key("mlp", "MLP, within a layer.")
    mlp_norm: Parts | None = _key(
        "post_attention_layernorm", "Norm before the MLP, or several: the first there is; or null."
    )
    mlp_post_norm: Part | None = _key(None, "Norm between the MLP and the residual stream.")
    cache: Part = _key("past_key_values", "Argument that hands layers and attention the cache.")
    layer_gives_tuple: bool = _key(False, "A layer returns (hidden state, ...).")
    final_norm: Part = _key("model.norm", "Path of the norm before the head.")
    head: Part = _key("lm_head", "Path of the language-model head.")
    logit_cap: Part | None = _key(None, "Configuration entry c: logits are c tanh(logits / c).")
    logit_factor: Part | None = _key(None, "Entry by which the head's output is multiplied.")
    logit_divisor: Part | None = _key(None, "Entry by which the head's output is divided.")
    residual_factor: Part | None = _key(
        None, "Entry by which a sublayer's output is multiplied before it is added."
    )
    layer_types: list[Literal["full_attention", "sliding_attention"]] = _key(
        ["full_attention"], "Kinds of attention layer for which the row is right.", min_length=1
    )
    granularities: list[Granularity] = _key(
        ["attention", "mlp", "block"], "What may be routed.", min_length=1
    )
    on: list[Part] = _key([], "Configuration entries that must be set and true.")
    off: list[Part] = _key([], "Configuration entries that must be unset or false.")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, entries: Any) -> Any:
        if not isinstance(entries, dict):
            return entries
        # YAML 1.1, which PyYAML reads, takes the bare words on and off for true and false.
        words = {True: "on", False: "off"}
        return {words.get(k, k) if isinstance(k, bool) else k: v for k, v in entries.items()}


class ModelSpec(_Spec):
    """The base model; its weights are never changed."""

    name: str = Field(
        min_length=1, description='Hub id, folder, or "embedded:..." (see embedded.py).'
    )
    revision: str | None = _key(None, "Branch, tag or commit of the hub; null is its default.")
    dtype: Literal["float32", "bfloat16", "float16"] = _key("float32", "Type of the base weights.")
    device: str = _key("auto", "Where it runs: cpu, cuda, cuda:1, or auto: a GPU if there is one.")
    device_map: str | None = _key(None, 'How accelerate spreads it over GPUs, such as "auto".')
    shard: bool = _key(
        False, "Decoder layers are spread over the processes of `accelerate launch`."
    )
    trust_remote_code: bool = _key(False, "Run Python code that comes with the model.")
    family: FamilySpec | None = _key(
        None, "Row of an architecture that has none: see mskip doctor --model."
    )


class RoutingSpec(_Spec):
    """Which sublayers get a router, and how many of their calls are to be executed."""

    granularity: Granularity = _key("attention", "What a router may skip: block is both.")
    unit: Unit = _key("sequence", "What decides: a prompt for all, or each token; PyTorch only.")
    layers: Layers | None = _key(None, "Indices, from 0; null goes by last and exclude_last.")
    choose: Literal["last", "least_harmful"] = _key("last", "Which ones, where layers is null.")
    last: Count = _key(16, "Number of routed layers; choose last: those before exclude_last; >= 1.")
    exclude_last: Index = _key(1, "Number of layers at the very end left unrouted; >= 0.")
    capacity: Share = _key(0.5, "Executed share of routed calls, 0..1; skip rate = 1 - capacity.")

    @field_validator("layers")
    @classmethod
    def _no_repeats(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("Input should have no repeats")
        return layers

    @property
    def measures(self) -> bool:
        """Whether the routed layers are known only after measuring the model."""
        return self.layers is None and self.choose == "least_harmful"

    def candidates(self, num_layers: int) -> list[int]:
        """Layers that may be routed: with ``choose: least_harmful`` all but ``exclude_last``."""
        if self.measures:
            return list(range(max(0, num_layers - self.exclude_last)))
        return self.routed_layers(num_layers)

    def routed_layers(self, num_layers: int) -> list[int]:
        """Ascending indices of the routed layers in a model of ``num_layers`` decoder layers.

        With ``choose: least_harmful`` they are known after measuring only; then these are as
        many.

        Raises:
            RecipeError: `layers`, or `last` with `exclude_last`, does not fit; names the key.
        """
        end = num_layers - self.exclude_last
        layers = sorted(self.layers or range(end - self.last, end))
        if layers[0] < 0 or layers[-1] >= num_layers:
            keys = f"routing.last = {self.last}, routing.exclude_last = {self.exclude_last}"
            keys = f"routing.layers = {self.layers}" if self.layers else keys
            raise RecipeError(f"{keys}: the model has only {num_layers} layers, counted from 0.")
        return layers


class StaticSpec(_Spec):
    """Removal for good: the yardstick of routing, and the artefact of ``method: static``."""

    rule: Literal["cosine", "kl", "greedy"] = _key("greedy", "What decides which sublayers go.")
    removed: Layers | None = _key(None, "Indices that go, from 0; null goes by rule.")


class CompensationSpec(_Spec):
    """What a skipped sublayer adds in place of its output: a low-rank map of its input.

    Rank 0 is the paper's skip, which adds nothing, and leaves the routers alone to be tuned.
    """

    rank: Index | Literal["full"] = _key(0, "Rank of the maps; 0 adds nothing; >= 0 or full.")
    ridge: NonNeg = _key(0.01, "Ridge penalty, in mean variances of the input; >= 0.")
    refine: bool = _key(False, "Train the maps together with the routers.")
    learning_rate: Positive = _key(1e-3, "Highest learning rate of refined maps; > 0.")


class RouterSpec(_Spec):
    """The router: one linear map hidden -> 1 on the mean prompt position, then a sigmoid."""

    bias: bool = _key(True, "Give the linear map a bias.")
    normalize: bool = _key(True, "Standardise the pooled input; folded into weight and bias.")
    init: Literal["zeros", "sensitivity", "greedy"] = _key(
        "greedy", "All 0, by effect of skipping alone, or by that after earlier removals."
    )
    init_scale: NonNeg = _key(1.5, "Standard deviation of the first logits; >= 0.")
    sensitivity_prompts: Count = _key(24, "Prompts on which sensitivity is measured; >= 1.")


class TuningSpec(_Spec):
    """Router-Tuning: the backbone is frozen, only the routers learn.

    The paper's public code ends at about the same capacity whatever the target: its hinge has
    weight 0 and sees one sequence at a time. Hence the relaxed gate and the multiplier here.
    """

    loss: Literal["kl", "lm"] = _key("kl", "Divergence from the dense model, or next-token loss.")
    kl_temperature: Positive = _key(1.0, "Divides both models' logits in the kl loss; > 0.")
    relaxation: Literal["concrete", "straight_through"] = _key("concrete", "The gate in training.")
    temperature: Positive = _key(0.67, "Divides the logit in the gate's relaxation; > 0.")
    noise_until: Share = _key(0.5, "Share of the steps after which gate noise is zero, 0..1.")
    constraint: Literal["multiplier", "hinge"] = _key("multiplier", "What holds capacity.")
    constraint_gain: NonNeg = _key(6.0, "Price per unit of excess, in first prices; >= 0.")
    constraint_integral: NonNeg = _key(0.4, "The same for the excess summed by step; >= 0.")
    hinge_weight: NonNeg = _key(1.0, "Weight of max(0, capacity - target); >= 0.")
    capacity_warmup: Share = _key(
        0.0, "Share of the steps in which the target falls from 1 to the capacity, 0..1."
    )
    epochs: Positive = _key(3.0, "Passes over the tuning data; > 0.")
    max_steps: int = _key(-1, "Optimiser steps; above 0 it replaces epochs; >= -1.", ge=-1)
    batch_size: Count = _key(8, "Sequences per forward pass; >= 1.")
    gradient_accumulation: Count = _key(1, "Forward passes per optimiser step; >= 1.")
    learning_rate: Positive = _key(0.1, "Highest learning rate; > 0.")
    lr_scheduler: Scheduler = _key("cosine_with_min_lr", "Course of the learning rate.")
    lr_scheduler_kwargs: dict[str, float] = _key(
        {"min_lr_rate": 0.2}, "Further arguments of the course."
    )
    warmup_ratio: Share = _key(0.1, "Share of the steps in which the rate rises from 0, 0..1.")
    weight_decay: NonNeg = _key(0.0, "Weight decay of AdamW; >= 0.")
    max_grad_norm: Positive = _key(1.0, "Norm to which gradients are clipped; > 0.")
    max_length: Count = _key(512, "Longest sequence, in tokens; >= 1.")
    gradient_checkpointing: bool = _key(False, "Compute layers twice rather than keep them.")
    bf16: Literal["auto", True, False] = _key(
        "auto", "bfloat16 autocast; auto: where it is native."
    )
    cache_gib: NonNeg = _key(2.0, "Dense activations kept between epochs, in GiB; >= 0.")
    report_to: list[str] = _key([], "Loggers of transformers, such as tensorboard or wandb.")
    seed: Seed = _key(0, "Seed of data order and gate noise, 0..2**32 - 1.")
    save_steps: Count = _key(20, "Optimiser steps between checkpoints; >= 1.")
    logging_steps: Count = _key(1, "Optimiser steps between log lines; >= 1.")
    check_targets: list[Share] = _key([], "Further capacities to tune for, as a check, 0..1.")


class DataSpec(_Spec):
    """The sequences to tune on, and those kept apart to calibrate and to evaluate."""

    source: str = _key(
        "embedded:prompts",
        "Shipped prompts, name of docs/data.md, hub data set, or file.",
        min_length=1,
    )
    split: str = _key("train", "Split of a hub data set.", min_length=1)
    max_samples: Count | None = _key(None, "Most sequences to tune on, >= 1; null takes all.")
    calibration: Count = _key(48, "Sequences kept apart to calibrate tau; >= 1.")
    held_out: Count = _key(48, "Sequences kept apart to evaluate and validate; >= 1.")
    answer_tokens: Count = _key(48, "Tokens the dense model answers to a shipped prompt; >= 1.")
    shuffle_buffer: Index = _key(0, "Records to draw from while reading; 0 keeps the order; >= 0.")
    seed: Seed = _key(0, "Seed of reading and of the division into parts, 0..2**32 - 1.")


class CalibrationSpec(_Spec):
    """How tau is found for a capacity."""

    per_layer: bool = _key(False, "One tau a layer in place of one for all.")
    max_evaluations: Count = _key(40, "Most trials of tau; >= 1.")


class EvaluationSpec(_Spec):
    """How quality is measured."""

    prompts: Count = _key(32, "Held-out prompts to measure on; >= 1.")


class ExportSpec(_Spec):
    """The exported graph."""

    target: Literal["onnx"] = _key("onnx", "Format of the graph.")
    opset: int = _key(20, "ONNX opset, 18..23.", ge=18, le=23)
    dtype: Literal["float32"] = _key("float32", "Type of weights and activations.")


class ValidationLimits(_Spec):
    """What an engine has to reach against PyTorch; logits with decisions forced equal."""

    decision_agreement: Share = _key(1.0, "Min share of equal decisions, 0..1.")
    logits_max_abs: NonNeg = _key(1e-3, "Max absolute difference of logits; >= 0.")
    logits_max_rel: NonNeg = _key(1e-2, "Max relative difference of logits; >= 0.")
    token_match: Share = _key(1.0, "Min share of equal greedy tokens, 0..1.")
    skipped_branch_nodes: Index = _key(0, "Max nodes executed in skipped branches; >= 0.")
    laziness_ratio: NonNeg = _key(1.05, "Min time forced-execute / forced-skip; >= 0.")
    batch_invariance_max_abs: NonNeg = _key(1e-3, "Max |logits alone - logits batched|; >= 0.")
    quality_difference: NonNeg = _key(1e-3, "Max |KL engine - KL torch|, in nats; >= 0.")


class RoundedLimits(_Spec):
    """What an engine with fewer bits has to reach against PyTorch with all of them."""

    decision_agreement: Share = _key(0.98, "Min share of equal decisions, 0..1.")
    kl: NonNeg = _key(0.02, "Max mean KL of next tokens, in nats, decisions forced equal; >= 0.")
    next_token_match: Share = _key(0.95, "Min share of equal likeliest next tokens, 0..1.")
    quality_difference: NonNeg = _key(0.02, "Max |KL engine - KL torch|, in nats; >= 0.")
    batch_invariance_max_abs: NonNeg = _key(1e-3, "Max |logits alone - logits batched|; >= 0.")


class ValidationSpec(_Spec):
    """How an exported engine is proven against PyTorch."""

    prompts: Count = _key(32, "Held-out prompts to compare on; >= 1.")
    steps: Count = _key(32, "Tokens decoded for each prompt; >= 1.")
    limits: ValidationLimits = _key(ValidationLimits(), "What the engine has to reach.")
    int8: RoundedLimits = _key(RoundedLimits(), "In place of some of them, with --weights int8.")
    int4: RoundedLimits = _key(
        RoundedLimits(
            decision_agreement=0.95, kl=0.1, next_token_match=0.85, quality_difference=0.1
        ),
        "In place of some of them, with --weights int4.",
    )
    float16: RoundedLimits = _key(
        RoundedLimits(
            kl=0.002, next_token_match=0.97, quality_difference=0.005, batch_invariance_max_abs=0.1
        ),
        "In place of some of them, with --precision fp16.",
    )
    bfloat16: RoundedLimits = _key(
        RoundedLimits(decision_agreement=0.95, next_token_match=0.93, batch_invariance_max_abs=1.0),
        "In place of some of them, with --precision bf16.",
    )


class BenchSpec(_Spec):
    """What is timed: every batch with every context."""

    batches: list[Count] = _key([1, 8], "Batch sizes, in sequences; each >= 1.", min_length=1)
    contexts: list[Count] = _key([128, 512, 2048], "Prompt tokens; each >= 1.", min_length=1)
    repeats: Count = _key(7, "Timings of each case; >= 1.")
    decode_steps: Count = _key(8, "Tokens decoded in one timing; >= 1.")
    threads: Count | None = _key(None, "CPU threads, >= 1; null leaves them to the engine.")


class Recipe(_Spec):
    """Every setting of a run, from the base model to the benchmark."""

    name: RunName = Field(description="Name of the run folder: a letter or digit, then also . _ -")
    model: ModelSpec = Field(description="The base model.")
    method: Literal["routed", "static"] = _key("routed", "Decide per prompt, or remove for good.")
    routing: RoutingSpec = _key(RoutingSpec(), "What is routed.")
    router: RouterSpec = _key(RouterSpec(), "What a router is.")
    static: StaticSpec = _key(StaticSpec(), "What is removed for good.")
    compensation: CompensationSpec = _key(CompensationSpec(), "What stands in for a skip.")
    tuning: TuningSpec = _key(TuningSpec(), "How the routers learn.")
    data: DataSpec = _key(DataSpec(), "What they learn from.")
    calibration: CalibrationSpec = _key(CalibrationSpec(), "How tau is found.")
    evaluation: EvaluationSpec = _key(EvaluationSpec(), "What quality is measured on.")
    export: ExportSpec = _key(ExportSpec(), "What is exported.")
    validation: ValidationSpec = _key(ValidationSpec(), "How the export is proven.")
    bench: BenchSpec = _key(BenchSpec(), "What is timed.")


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing repeated keys where PyYAML keeps the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(None, None, f"repeated key {key.value}", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


class _Dumper(yaml.SafeDumper):
    """The safe dumper, quoting what `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):  # YAML 1.1, which PyYAML reads, takes 1e-5 for text
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML lets bare errors out for bad bytes, `!!bool maybe`, 2024-13-45 and deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"{where}: YAML error{line}: {problem}.") from error


def read_yaml(name_or_path: str, shipped: Sequence[str]) -> Any:
    """The value of a YAML file, or of a shipped one.

    Args:
        name_or_path: a name, which may begin with a folder of the shipped ones, or a file.
        shipped: names that go before files.

    Raises:
        RecipeError: unreadable file or YAML.
    """
    try:
        if name_or_path.removeprefix("paper/") in shipped:
            text = (resources.files("mskip.recipes") / f"{name_or_path}.yaml").read_bytes()
        else:
            text = Path(name_or_path).read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read recipe '{name_or_path}': {error.strerror}.",
            f"Give a YAML file, or a shipped recipe: {', '.join(shipped)}.",
        ) from error
    return _parse(text, f"recipe '{name_or_path}'")


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _overridden(tree: Any, override: str) -> Any:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override '{override}' has no '=': write key.sub=value")
    value = _parse(text, f"override '{override}'")
    for key in reversed(path.strip().split(".")):
        value = {key: value}
    return _merged(tree, value)


def _paths(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in spec.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def _fault(error: Mapping[str, Any]) -> str:
    """One pydantic error in one line: dotted path, value, what is allowed."""
    path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in error["loc"]).lstrip(".")
    if error["type"] in ("extra_forbidden", "invalid_key"):
        if path.startswith("model.family."):
            return f"unknown key '{path}'; a row has: {', '.join(FamilySpec.model_fields)}"
        near = difflib.get_close_matches(path, _paths(Recipe), n=1)
        return f"unknown key '{path}'" + (f", did you mean '{near[0]}'?" if near else "")
    if error["type"] == "missing":
        return f"'{path}' is missing"
    allowed = error["msg"].partition("should ")[2].replace("valid string", "string, in quotes")
    allowed = re.sub(r"valid dictionary or instance of \w+", "mapping of keys", allowed)
    return f"'{path}' is {reprlib.repr(error['input'])}, it should {allowed}"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it whole.

    Args:
        name_or_path: a shipped recipe's name, which goes before a file of that name, or a file.
        overrides: ``key.sub=value``, value in YAML; mappings are merged, the last one wins.

    Raises:
        RecipeError: unreadable file or YAML; or, one a line, all wrong keys, values, overrides.
    """
    tree = read_yaml(name_or_path, shipped_recipes())
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe '{name_or_path}': the top level is not a mapping of keys")
    faults: list[str] = []
    for override in overrides:
        try:
            tree = _overridden(tree, override)
        except RecipeError as error:
            faults.append(error.message)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [_fault(dict(each)) for each in error.errors()]
    if faults:
        raise RecipeError("\n  ".join([f"recipe '{name_or_path}':", *faults]))
    return recipe


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with mskip, in alphabetical order."""
    files = (entry.name for entry in resources.files("mskip.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every value, defaults included, in the models' order; `load_recipe` reads it back."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with every key's meaning, unit and range."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
