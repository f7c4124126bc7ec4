"""Every row of the table of architectures, on tiny random models with every feature on.

The oracles share no code with what is tested: a skipped attention or MLP has its last
projection zeroed by hand, a skipped block is run through by hand, one sequence at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from architectures import FULL, MODELS, SLIDING, WINDOW, class_of, layers_of, make, row_of
from torch import Tensor
from transformers import PreTrainedModel

from mskip.compressor.baselines import measure_sensitivity
from mskip.compressor.cache import RoutedCache, RoutedSlidingLayer
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Batch
from mskip.compressor.errors import ModelError
from mskip.compressor.evaluation import Reference
from mskip.compressor.families import FAMILIES, family_of, layer_types_of
from mskip.compressor.fitting import fit_compensation
from mskip.compressor.loss import RelaxedPass
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.router import Routers
from mskip.compressor.routing import Call, ForcedPass
from mskip.compressor.segments import SplitModel
from mskip.compressor.skipping import MindSkip
from mskip.compressor.sublayers import Granularity, Sublayers

Prompts = Callable[..., Batch]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS = [0, 2, 3]
GEMMA = "gemma3_text, sliding"
LENGTHS = [9, 4, 7, 1, 6, 9, 3, 8]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    return make(name)


@pytest.fixture(autouse=True)
def _in_matrix(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> None:
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "name" in given and "kind" in given:
        record_property("family", [given["name"], given["kind"], "PyTorch"])


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return make(GEMMA)


@pytest.fixture(params=["attention", "mlp", "block"])
def kind(request: pytest.FixtureRequest, name: str) -> Granularity:
    value: Granularity = request.param
    if value not in FAMILIES[row_of(name)].granularities:
        pytest.skip("the row does not offer it; test_a_granularity_that_is_not_offered_is_refused")
    return value


def routers_of(
    model: PreTrainedModel, kind: Granularity, compensation: Compensation | None = None
) -> Routers:
    """Routers that execute about half of random prompts, each layer in its own way."""
    generator = torch.Generator().manual_seed(1)
    routers = Routers(Sublayers(LAYERS, kind, compensation), model.config.hidden_size)
    prompts = torch.randint(3, 97, (64, 6), generator=generator)
    means: dict[int, Tensor] = {}

    def record(call: Call) -> Tensor:
        means[call.index] = call.hidden.mean(dim=1)
        return call.execute(None)

    with patched(model, routers.sublayers):
        model(prompts, use_cache=False, routing=record)
    routers.standardise(torch.stack([means[index] for index in range(len(LAYERS))], dim=1))
    routers.weight.normal_(std=3.0, generator=generator)
    return routers.requires_grad_(False)


def types_of(model: PreTrainedModel) -> list[str]:
    """Kind of every decoder layer's attention."""
    types: list[str] | None = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    return types or [FULL if window is None else SLIDING] * model.config.num_hidden_layers


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}


def dense_logits(model: PreTrainedModel, **arguments: Any) -> Tensor:
    logits: Tensor = model(**arguments, use_cache=False).logits
    return logits


@contextmanager
def removed(
    name: str, model: PreTrainedModel, kind: Granularity, layers: list[int]
) -> Iterator[None]:
    """The model with sublayers taken out by hand."""
    zeroed: list[Tensor] = []
    blocks, tiny = layers_of(name, model), MODELS[name]
    kept = list(blocks)
    for layer in layers:
        if kind == "block":
            blocks[layer] = PassBy(tuple_=row_of(name) == "falcon")
        else:
            last = tiny.attention if kind == "attention" else tiny.mlp
            zeroed += list(kept[layer].get_submodule(last).parameters())
    saved = [tensor.clone() for tensor in zeroed]
    for tensor in zeroed:
        tensor.zero_()
    try:
        yield
    finally:
        for tensor, values in zip(zeroed, saved, strict=True):
            tensor.copy_(values)
        for layer in layers:
            blocks[layer] = kept[layer]


class PassBy(torch.nn.Module):
    """A layer that is not there."""

    def __init__(self, *, tuple_: bool) -> None:
        super().__init__()
        self.tuple = tuple_

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if self.tuple else hidden_states


def by_hand(name: str, skip: MindSkip, kind: Granularity, ids: Tensor, decisions: Tensor) -> Tensor:
    """Logits of one sequence, its skipped sublayers taken out."""
    skipped = [layer for layer, on in zip(LAYERS, decisions.tolist(), strict=True) if not on]
    skip.detach()
    try:
        with removed(name, skip.model, kind, skipped):
            return dense_logits(skip.model, input_ids=ids)
    finally:
        skip.__init__(skip.model, skip.routers, skip.tau)  # type: ignore[misc]


def everything(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def test_every_row_has_a_model() -> None:
    assert {row_of(name) for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in MODELS if "sliding" in name], scope="module")
def test_sliding_models_slide(name: str, prompt_batch: Prompts) -> None:
    """What the other tests rest on: masks differ by kind of layer, and prompts are longer."""
    model = make(name)
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, __, kwargs, i=i: seen.update({str(i): kwargs["attention_mask"]}),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers_of(name, model))
    ]
    dense_logits(model, **inputs(prompt_batch([12, 9])))
    for hook in hooks:
        hook.remove()
    for index, each in enumerate(types_of(model)):
        mask = seen[str(index)][0, 0, -1]  # bool, or added to the scores
        sees = int((mask if mask.dtype == torch.bool else mask == 0).sum())
        assert sees == (WINDOW if each == SLIDING else 12)


# -- in two parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stem_finish_and_logits_are_the_model(
    name: str, attention: str, first: int, side: Literal["left", "right"], prompt_batch: Prompts
) -> None:
    if attention == "sdpa" and not class_of(name)._supports_sdpa:
        pytest.skip("sdpa leaves the soft-capping out, and transformers refuses it")
    model = make(name, attention)
    batch = prompt_batch(LENGTHS, side=side)
    split = SplitModel(model, first)
    stem = split.stem(*inputs(batch).values())
    dense = dense_logits(model, **inputs(batch))
    assert torch.equal(split.logits(split.finish(stem)), dense)
    arguments = split.layer_arguments(*inputs(batch).values())
    assert torch.equal(split.logits(split.finish(type(stem)(stem.hidden, arguments))), dense)
    some = split.logits(split.finish(stem.rows([5, 1, 3])))
    for row, original in enumerate([5, 1, 3]):
        real = batch["attention_mask"][original].bool()
        torch.testing.assert_close(some[row, real], dense[original, real], **CLOSE)


# -- skipping ---------------------------------------------------------------------------------


def test_detach_restores_the_model_bitwise(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    batch = inputs(prompt_batch(LENGTHS))
    dense, before = dense_logits(model, **batch), everything(model)
    skip = MindSkip(model, routers_of(model, kind), tau=1.1)
    assert not torch.equal(dense_logits(model, **batch), dense)
    skip.detach()
    assert everything(model) == before
    assert torch.equal(dense_logits(model, **batch), dense)


def test_all_execute_is_dense_and_all_skip_is_without(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    batch = inputs(prompt_batch(LENGTHS, side="right"))
    dense = dense_logits(model, **batch)
    with removed(name, model, kind, LAYERS):
        without = dense_logits(model, **batch)
    assert not torch.equal(without, dense)
    with MindSkip(model, routers_of(model, kind), tau=0.0):
        assert torch.equal(dense_logits(model, **batch), dense)
        assert torch.equal(model(**batch, use_cache=True).logits, dense)
        assert torch.equal(dense_logits(model, **batch, routing=None), dense)
    with MindSkip(model, routers_of(model, kind), tau=1.1):
        assert torch.equal(dense_logits(model, **batch), without)
        assert torch.equal(model(**batch, use_cache=True).logits, without)


def test_a_skip_leaves_the_residual_stream_as_it_is(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    """Exactly, post-norms included: with the other sublayer taken out the layer does nothing."""
    batch = prompt_batch(LENGTHS)
    split = SplitModel(model, LAYERS[1])
    number, layer = split.upper[0]
    stem = split.stem(*inputs(batch).values())
    routing = ForcedPass(torch.zeros(1, 1, dtype=torch.bool))

    def after() -> Tensor:
        with patched(model, Sublayers([number], kind)):
            return split.run(layer, stem.arguments[number], routing, stem.hidden)

    if kind == "block":
        assert torch.equal(after(), stem.hidden)
        return
    assert not torch.equal(after(), stem.hidden)
    other: Granularity = "mlp" if kind == "attention" else "attention"
    with removed(name, model, other, [number]):
        assert torch.equal(after(), stem.hidden)


def test_a_granularity_that_is_not_offered_is_refused() -> None:
    model = make("mixtral, sliding")
    with pytest.raises(ModelError, match="can be routed by attention, not by mlp"):
        MindSkip(model, Routers(Sublayers([1], "mlp"), 32))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_sequence_alone(
    name: str,
    model: PreTrainedModel,
    kind: Granularity,
    side: Literal["left", "right"],
    prompt_batch: Prompts,
) -> None:
    batch = prompt_batch(LENGTHS, side=side)
    with MindSkip(model, routers_of(model, kind)) as skip:
        output = model(**inputs(batch), use_cache=True)
        decisions = output.past_key_values.decisions
        assert len(set(map(tuple, decisions.tolist()))) >= 3, "the test needs mixed decisions"
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row][mask][None]
            alone = model(ids, use_cache=True)
            torch.testing.assert_close(output.logits[row, mask], alone.logits[0], **CLOSE)
            assert torch.equal(alone.past_key_values.decisions[0], decisions[row])
            expected = by_hand(name, skip, kind, ids, decisions[row])
            torch.testing.assert_close(output.logits[row, mask], expected[0], **CLOSE)


# -- with a cache, beyond the window ----------------------------------------------------------


@pytest.mark.parametrize("chunks", [[7] + [1] * 6, [2] + [1] * 8, [3, 5, 1, 4]])
def test_prefill_and_decoding_is_one_long_forward(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts, chunks: list[int]
) -> None:
    """Prompts shorter and longer than the window, chunks that reach across it; padding too."""
    first = chunks[0]
    lengths = [first, max(first - 2, 1), first, max(first - 1, 1), first, 1]
    batch = prompt_batch(lengths)
    rest = prompt_batch([sum(chunks) - first] * 6, seed=1)["input_ids"]
    ids = torch.cat([batch["input_ids"], rest], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(rest)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt_mask = torch.cat([batch["prompt_mask"], torch.zeros_like(rest).bool()], dim=1)
    with MindSkip(model, routers_of(model, kind)) as skip:
        cache, parts, end = skip.cache(), [], 0
        for size in chunks:
            start, end = end, end + size
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            parts.append(output.logits)
        decisions = cache.decisions
        assert decisions is not None
        assert 0 < float(decisions.float().mean()) < 1, "the test needs mixed decisions"
        whole = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            prompt_mask=prompt_mask,
            use_cache=False,
        )
        logits = torch.cat(parts, dim=1)
        for row in range(6):
            real = mask[row].bool()
            torch.testing.assert_close(logits[row, real], whole.logits[row, real], **CLOSE)
            expected = by_hand(name, skip, kind, ids[row, real][None], decisions[row])
            torch.testing.assert_close(logits[row, real], expected[0], **CLOSE)


def test_sliding_layers_hold_the_window_and_executing_rows_only(
    model: PreTrainedModel, prompt_batch: Prompts
) -> None:
    types = types_of(model)
    batch = prompt_batch([9] * 8)
    with MindSkip(model, routers_of(model, "attention")):
        cache = model(**inputs(batch), use_cache=True).past_key_values
    assert isinstance(cache, RoutedCache)
    executing = cache.decisions.sum(dim=0).tolist()
    for layer in range(5):
        held = cache.layers[layer]
        assert held.get_seq_length() == 9
        rows = executing[LAYERS.index(layer)] if layer in LAYERS else 8
        assert rows > 0, "the test needs executing rows in every layer"
        positions = WINDOW - 1 if types[layer] == SLIDING else 9
        assert held.keys.shape[0] == rows
        assert held.keys.shape[2] == positions
        assert isinstance(held, RoutedSlidingLayer) == (layer in LAYERS and types[layer] == SLIDING)


def test_rearranged_rows_continue_beyond_the_window(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([11] * 8)["input_ids"]
    rows = [5, 0, 0, 7, 1, 6, 6, 2]
    with MindSkip(model, routers_of(model, kind)) as skip:
        cache = model(ids[:, :6], use_cache=True).past_key_values
        decisions = cache.decisions.clone()
        cache.reorder_cache(torch.tensor(rows))
        steps = [model(ids[rows, t : t + 1], past_key_values=cache).logits for t in range(6, 11)]
        for place, row in enumerate(rows):
            expected = by_hand(name, skip, kind, ids[row][None], decisions[row])
            found = torch.cat([step[place] for step in steps])
            torch.testing.assert_close(found, expected[0, 6:], **CLOSE)


@pytest.mark.parametrize("decision", [0, 1])
def test_crop_of_sliding_layers(
    gemma: PreTrainedModel, prompt_batch: Prompts, decision: int
) -> None:
    """Within the window, and beyond it where the past was recorded, as assisted decoding does."""
    ids = prompt_batch([12] * 2)["input_ids"]
    with MindSkip(gemma, routers_of(gemma, "attention")) as skip:
        gates = torch.full((2, 3), decision)
        for seen, taken_back in ((3, 1), (9, 3), (9, 0)):
            cache = skip.cache(gates)
            gemma(ids[:, :2], past_key_values=cache)
            cache.activate_past_recording()
            gemma(ids[:, 2:seen], past_key_values=cache)
            cache.crop(-taken_back)
            left = seen - taken_back
            assert [cache.get_seq_length(layer) for layer in range(5)] == [left] * 5
            rest = gemma(ids[:, left:], past_key_values=cache).logits
            for row in range(2):
                expected = by_hand(
                    "gemma3_text, sliding", skip, "attention", ids[row][None], gates[row]
                )
                torch.testing.assert_close(rest[row], expected[0, left:], **CLOSE)


def test_crop_where_rows_left_and_nobody_executes(
    gemma: PreTrainedModel, prompt_batch: Prompts
) -> None:
    ids = prompt_batch([8] * 2)["input_ids"]
    with MindSkip(gemma, routers_of(gemma, "attention")) as skip:
        cache = skip.cache(torch.tensor([[1, 1, 1], [0, 0, 0]]))
        gemma(ids[:, :2], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.activate_past_recording()
        gemma(ids[1:, 2:7], past_key_values=cache)
        cache.crop(-2)
        assert [cache.get_seq_length(layer) for layer in range(5)] == [5] * 5
        copied = copy.deepcopy(cache)
        rest = gemma(ids[1:, 5:], past_key_values=cache).logits
        expected = by_hand(GEMMA, skip, "attention", ids[1:], torch.zeros(3))
        torch.testing.assert_close(rest, expected[:, 5:], **CLOSE)
        copied.reset()
        assert copied.get_seq_length() == copied.get_seq_length(2) == copied.kv_bytes() == 0


def test_greedy_generation_is_one_by_one(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    """Through `generate`, whose own empty cache is taken over."""
    batch = prompt_batch([6, 2, 5, 1])
    options = {"max_new_tokens": 7, "do_sample": False}
    with MindSkip(model, routers_of(model, kind)) as skip:
        together = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], **options
        )[:, -7:]
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row][mask][None]
            decisions = model(ids, use_cache=True).past_key_values.decisions[0]
            for _ in range(7):
                token = by_hand(name, skip, kind, ids, decisions)[:, -1:].argmax(-1)
                ids = torch.cat([ids, token], dim=1)
            assert torch.equal(ids[0, -7:], together[row])


def test_assisted_generation_beyond_the_window_is_greedy(
    gemma: PreTrainedModel, prompt_batch: Prompts
) -> None:
    with MindSkip(gemma, routers_of(gemma, "attention")) as skip:
        for ids in prompt_batch([4] * 6)["input_ids"]:
            prompt = ids.repeat(2)[None]  # repeats itself: prompt lookup has something to propose
            decisions = gemma(prompt, use_cache=True).past_key_values.decisions
            options = {"max_new_tokens": 8, "do_sample": False}
            plain = gemma.generate(prompt, **options, past_key_values=skip.cache(decisions))
            assisted = gemma.generate(
                prompt,
                **options,
                past_key_values=skip.cache(decisions),
                prompt_lookup_num_tokens=3,
            )
            assert torch.equal(assisted, plain)


# -- tuning, baselines, compensation ----------------------------------------------------------


def test_relaxed_gates_scale_what_reaches_the_residual_stream(
    name: str, model: PreTrainedModel, kind: Granularity, prompt_batch: Prompts
) -> None:
    """The gradient of a gate is that of a factor on the sublayer's contribution, post-norm and
    all: before the norm it would be zero where the gate is open, and a thousandfold where shut.
    """
    batch = prompt_batch([6, 4])
    only = LAYERS[1]
    row = family_of(model)
    routers = Routers(Sublayers([only], kind), 32)
    split = SplitModel(model, only)
    stem = split.stem(*inputs(batch).values())
    target = torch.randn(97, generator=torch.Generator().manual_seed(0))

    def measure(final: Tensor) -> Tensor:
        return (split.logits(final)[batch["attention_mask"].bool()] @ target).sum()

    for open_ in (1.0, 0.0):
        with torch.enable_grad():
            factor = torch.tensor(open_, requires_grad=True)
            last = row.post_norm_of(model, only, kind) or row.sublayer_of(model, only, kind)

            def scale(_: Any, args: Any, output: Any, factor: Tensor = factor) -> Any:
                if kind == "block":
                    scaled = args[0] + (row.hidden_of(output) - args[0]) * factor
                    return (scaled, None) if row.layer_gives_tuple else scaled
                if isinstance(output, tuple):
                    return (output[0] * factor, *output[1:])
                return output * factor

            hook = last.register_forward_hook(scale)
            measure(split.finish(stem)).backward()
            hook.remove()
            with patched(model, Sublayers([only], kind)):
                bias = torch.full((1,), 1e-3 if open_ else -1e-3)
                routers.bias = torch.nn.Parameter(bias)
                routing = RelaxedPass(routers, batch["prompt_mask"], 1.0, None)
                measure(split.finish(stem, routing)).backward()
        assert factor.grad is not None
        assert routers.bias.grad is not None
        # sigmoid'(0) = 1/4; both sequences share the bias, as they share the factor.
        torch.testing.assert_close(routers.bias.grad[0] * 4, factor.grad, rtol=1e-3, atol=1e-4)
        assert abs(float(factor.grad)) > 1e-2


@pytest.fixture
def reference(
    model: PreTrainedModel, make_samples: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Reference:
    base = BaseModel(model, make_tokenizer(), None, "")  # type: ignore[arg-type]
    return Reference(base, LAYERS[0], make_samples(24, prompt=(5, 9), answer=(3, 6)))


def test_cosine_compares_the_residual_stream_before_and_after(
    name: str, model: PreTrainedModel, kind: Granularity, reference: Reference
) -> None:
    with patched(model, Sublayers(LAYERS, kind)):
        found = measure_sensitivity(reference, Sublayers(LAYERS, kind))
    row = family_of(model)
    factor = row.residual_factor_of(model)
    for index, layer in enumerate(LAYERS):
        seen: dict[str, list[Tensor]] = {"attention": [], "mlp": [], "before": []}
        block = layers_of(name, model)[layer]
        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, seen=seen: seen["before"].append(args[0])
            )
        ]
        kinds: list[Granularity] = ["attention", "mlp"]
        for each in kinds:
            last = row.post_norm_of(model, layer, each) or row.sublayer_of(model, layer, each)

            def note(_: Any, __: Any, output: Any, each: str = each, seen: Any = seen) -> None:
                added = output[0] if isinstance(output, tuple) else output
                seen[each].append(factor * added)

            hooks.append(last.register_forward_hook(note))
        for _, stem in reference.batches:
            reference.split.finish(stem)
        for hook in hooks:
            hook.remove()
        cosines = []
        for number, (batch, _) in enumerate(reference.batches):
            before, attention, mlp = (
                seen[place][number] for place in ("before", "attention", "mlp")
            )
            if kind == "mlp" and not MODELS[name].parallel:
                before = before + attention
            added = {"attention": attention, "mlp": mlp, "block": attention + mlp}[kind]
            cosine = torch.cosine_similarity(before, before + added, dim=-1)
            cosines.append(cosine[batch["attention_mask"].bool()])
        expected = float(torch.cat(cosines).mean())
        assert found.cosine[index] == pytest.approx(expected, abs=1e-4)


def test_full_rank_compensation_beats_the_plain_skip(
    model: PreTrainedModel, kind: Granularity, reference: Reference
) -> None:
    gates = torch.zeros(1, len(LAYERS), dtype=torch.bool)
    plain = Sublayers(LAYERS, kind)
    with patched(model, plain):
        without = reference.quality(lambda _: ForcedPass(gates)).kl
    fitted = Sublayers(LAYERS, kind, Compensation(len(LAYERS), 32, 32))
    with patched(model, fitted):
        fit_compensation(reference, fitted, gates, ridge=0.01)
        compensated = reference.quality(lambda _: ForcedPass(gates)).kl
    assert compensated < without


def test_compensation_reaches_the_residual_stream_as_it_is(
    gemma: PreTrainedModel, prompt_batch: Prompts
) -> None:
    """Not through the post-norm, which would bring any compensation to full size."""
    layer = gemma.model.layers[2]
    compensation = Compensation(1, 32, 32)
    compensation.bias.data.fill_(1e-3)
    split = SplitModel(gemma, 2)
    stem = split.stem(*inputs(prompt_batch([7, 7])).values())
    kinds: list[Granularity] = ["attention", "mlp"]
    for kind in kinds:
        between: list[Tensor] = []  # the stream between attention and MLP
        hook = layer.pre_feedforward_layernorm.register_forward_pre_hook(
            lambda _, args, between=between: between.append(args[0])
        )
        with patched(gemma, Sublayers([2], kind, compensation)):
            routing = ForcedPass(torch.zeros(1, 1, dtype=torch.bool))
            output = split.run(layer, stem.arguments[2], routing, stem.hidden)
        hook.remove()
        before, after = {
            "attention": (stem.hidden, between[0]),
            "mlp": (between[0], output),
        }[kind]
        torch.testing.assert_close(after, before + 1e-3)


# -- what is refused --------------------------------------------------------------------------


def bare(**entries: Any) -> Any:
    """A model of which only the configuration is at hand."""
    return SimpleNamespace(config=SimpleNamespace(**entries))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "opt"}, "'opt' is not supported"),
        ({"model_type": "falcon", "alibi": True, "new_decoder_architecture": True}, "alibi"),
        ({"model_type": "falcon"}, "without new_decoder_architecture"),
        ({"model_type": "llama", "layer_types": [FULL, "chunked_attention"]}, "chunked_attention"),
        ({"model_type": "llama", "sliding_window": 4}, "sliding_attention"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
    ],
)
def test_what_a_row_does_not_declare_is_refused(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        family_of(bare(**entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6},
    ],
)
def test_configurations_as_the_hub_has_them_are_accepted(entries: dict[str, Any]) -> None:
    assert family_of(bare(**entries)).model_type == entries["model_type"]


def test_a_window_that_is_not_in_use_makes_no_sliding_layers() -> None:
    config = bare(use_sliding_window=False, sliding_window=32768).config
    assert layer_types_of(config) == {FULL}
    assert layer_types_of(bare(sliding_window=32768).config) == {SLIDING}
