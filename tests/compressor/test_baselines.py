"""Static removal and what tuning starts from: sensitivities by hand, orders, first prices."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mskip.compressor.baselines import (
    Sensitivity,
    forced_to,
    greedy_removal,
    kept_count,
    kept_of,
    measure_sensitivity,
    router_inputs,
    static_gates,
)
from mskip.compressor.encoding import Sample
from mskip.compressor.evaluation import Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.recipe import RouterSpec
from mskip.compressor.router import Routers
from mskip.compressor.starting import cost_logits, first_price, initialise, threshold
from mskip.compressor.sublayers import Granularity, Sublayers

LAYERS = [1, 2, 4]
Kl = st.lists(st.floats(1e-6, 10), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[Sample]]) -> list[Sample]:
    return make_samples(9, answer=(1, 9))


@pytest.fixture(scope="module")
def measured(base: BaseModel, samples: list[Sample]) -> tuple[Sensitivity, Tensor]:
    with patched(base.model, LAYERS):
        reference = Reference(base, 1, samples, batch_size=4)
        return measure_sensitivity(reference, LAYERS), router_inputs(reference)


def watched(base: BaseModel, sample: Sample) -> dict[tuple[str, int], Tensor]:
    """Residual streams before, and outputs of norm and attention, in one ordinary call."""
    seen: dict[tuple[str, int], Tensor] = {}
    hooks = []
    for layer in LAYERS:
        block = base.model.model.layers[layer]
        for name, module in (
            ("before", block),
            ("normed", block.input_layernorm),
            ("added", block.self_attn),
        ):

            def keep(
                _: object, args: tuple[Tensor], output: object, key: tuple[str, int] = (name, layer)
            ) -> None:
                value = args[0] if key[0] == "before" else output
                seen[key] = (value[0] if key[0] == "added" else value)[0].clone()

            hooks.append(module.register_forward_hook(keep))
    base.model(torch.tensor([sample.input_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_cosine_by_hand(
    base: BaseModel, samples: list[Sample], measured: tuple[Sensitivity, Tensor]
) -> None:
    """Mean over all real positions of cos(x, x + attention(norm(x)))."""
    similar: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    for sample in samples:
        seen = watched(base, sample)
        for layer in LAYERS:
            before = seen["before", layer]
            after = before + seen["added", layer]
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            similar[layer].append((before * after).sum(-1) / norms)
    expected = [float(torch.cat(similar[layer]).mean()) for layer in LAYERS]
    assert measured[0].cosine == pytest.approx(expected, abs=1e-5)
    assert measured[0].layers == LAYERS


def test_kl_is_that_of_skipping_the_one(
    base: BaseModel, samples: list[Sample], measured: tuple[Sensitivity, Tensor]
) -> None:
    for index, layer in enumerate(LAYERS):
        pruned = copy.deepcopy(base.model)
        pruned.model.layers[layer].self_attn.o_proj.weight.zero_()
        total, tokens = 0.0, 0
        for sample in samples:
            ids = torch.tensor([sample.input_ids])
            p, q = (
                model(ids, use_cache=False).logits[0, sample.prompt_length - 1 : -1].softmax(-1)
                for model in (base.model, pruned)
            )
            total += float((p * (p.log() - q.log())).sum())
            tokens += len(p)
        assert measured[0].kl[index] == pytest.approx(total / tokens, rel=1e-3)


def test_router_inputs_are_prompt_means_of_the_dense_model(
    base: BaseModel, samples: list[Sample], measured: tuple[Sensitivity, Tensor]
) -> None:
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    expected = torch.stack(
        [
            torch.stack([seen["normed", layer][: s.prompt_length].mean(0) for layer in LAYERS])
            for s in ordered
            for seen in [watched(base, s)]
        ]
    )
    assert measured[1].shape == (9, 3, 32)
    torch.testing.assert_close(measured[1], expected, rtol=1e-4, atol=1e-5)


def test_measuring_leaves_no_hook(
    base: BaseModel, samples: list[Sample], measured: tuple[Sensitivity, Tensor]
) -> None:
    assert measured
    assert not any(layer._forward_pre_hooks for layer in base.model.model.layers)


# -- which to keep ----------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["attention", "mlp", "block"])
def test_greedy_costs_are_those_of_whole_passes(
    base: BaseModel, samples: list[Sample], granularity: Granularity
) -> None:
    """Removal after removal, and no other one that was measured would have been cheaper."""
    sublayers = Sublayers([1, 2, 3, 4], granularity)
    with patched(base.model, sublayers):
        reference = Reference(base, 1, samples)
        sensitivity = measure_sensitivity(reference, sublayers)
        greedy = greedy_removal(reference, sensitivity, 3)

        def kl(gone: list[int]) -> float:
            kept = [index for index in range(4) if index not in gone]
            return reference.quality(forced_to(static_gates(kept, 4))).kl

        assert sorted(greedy.order) == [0, 1, 2, 3]
        assert greedy.order[0] == sensitivity.order_by_kl()[0]
        reached = 0.0
        for step, index in enumerate(greedy.order[:3]):
            before, after = greedy.order[:step], greedy.order[: step + 1]
            reached += greedy.costs[index]
            assert reached == pytest.approx(kl(after), rel=1e-4)
            for other in set(range(4)) - set(after):
                cheaper = kl([*before, other]) < kl(after) - 1e-6
                # Only where its cost fell with a removal, which lazy greedy does not see.
                assert not cheaper or kl([*before, other]) - kl(before) < sensitivity.kl[other]


def test_what_is_kept() -> None:
    """By KL the dearest to skip, by cosine those that change the residual most."""
    sensitivity = Sensitivity([3, 5, 7, 9], kl=[0.2, 0.9, 0.1, 0.5], cosine=[0.99, 0.8, 0.5, 0.7])
    kept_kl = [kept_of(sensitivity.order_by_kl(), count) for count in range(5)]
    assert kept_kl == [[], [1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]
    kept_cosine = [kept_of(sensitivity.order_by_cosine(), count) for count in range(5)]
    assert kept_cosine == [[], [2], [2, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_static_gates() -> None:
    assert static_gates([0, 2], 4).tolist() == [[True, False, True, False]]
    assert not static_gates([], 3).any()


# -- where routers start ----------------------------------------------------------------------


@given(kl=Kl, target=st.floats(0, 1), scale=st.floats(0.1, 5))
def test_the_share_of_positive_logits_is_the_target(
    kl: list[float], target: float, scale: float
) -> None:
    logits = cost_logits(kl, target, scale)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    ordered = sorted(kl)
    if math.log(ordered[-1] / ordered[0]) < 0.1 or any(
        b / a < 1.001 for a, b in itertools.pairwise(ordered)
    ):
        return
    assert int((logits > 0).sum()) == round(target * len(kl))
    assert logits.argsort().tolist() == torch.tensor(kl).argsort().tolist()
    assert float(logits.std(correction=0)) == pytest.approx(scale, rel=1e-3)


@given(kl=Kl)
def test_equal_sensitivities_give_no_order(kl: list[float]) -> None:
    assert not cost_logits([kl[0]] * len(kl), 0.5, 1.5).any()


def test_sensitivity_of_nothing_is_finite() -> None:
    """A sublayer that changes nothing has KL zero, or less by rounding."""
    logits = cost_logits([0.0, -1e-9, 0.1, 0.2], 0.5, 1.5)
    assert logits.isfinite().all()
    assert (logits > 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.5, math.sqrt(0.4 * 0.2)), (0.25, math.sqrt(0.8 * 0.4)), (0.75, math.sqrt(0.2 * 0.1))],
)
def test_threshold_parts_the_share(target: float, expected: float) -> None:
    kl = [0.1, 0.8, 0.2, 0.4]
    assert threshold(kl, target) == pytest.approx(expected)
    assert first_price(kl, target) == pytest.approx(4 * expected)


def test_threshold_at_the_ends() -> None:
    kl = [0.1, 0.8, 0.2, 0.4]
    assert threshold(kl, 1.0) < 0.1
    assert threshold(kl, 0.0) > 0.8
    assert first_price(kl, 0.0) == first_price(kl, 1.0) == 0.0


@given(kl=Kl, target=st.floats(0.01, 0.99), factor=st.floats(0.1, 10))
def test_price_scales_with_the_sensitivities(kl: list[float], target: float, factor: float) -> None:
    scaled = [value * factor for value in kl]
    assert first_price(scaled, target) == pytest.approx(factor * first_price(kl, target))
    torch.testing.assert_close(
        cost_logits(scaled, target, 1.5),
        cost_logits(kl, target, 1.5),
        atol=0.02,
        rtol=0,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_initialise(measured: tuple[Sensitivity, Tensor], bias: bool, normalize: bool) -> None:
    """The mean prompt starts with the layer's logit, however a router is made."""
    sensitivity, inputs = measured
    routers = Routers(LAYERS, 32, bias=bias)
    spec = RouterSpec(bias=bias, normalize=normalize, init="sensitivity")
    initialise(routers, spec, inputs, {"sensitivity": sensitivity.kl}, 0.5)
    expected = cost_logits(sensitivity.kl, 0.5, spec.init_scale)
    logits = torch.stack(
        [
            routers.logit(index, inputs.mean(0)[index][None, None], torch.ones(1, 1))
            for index in range(3)
        ]
    )
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-3, atol=1e-3)
    assert bool(routers.bias.any()) == bias
    assert bool((routers.scale != 1).any()) == normalize
    if normalize and bias:
        normal = (inputs - routers.center) * routers.scale * 32**0.5
        torch.testing.assert_close(normal.mean(0), torch.zeros(3, 32), atol=1e-4, rtol=0)
        torch.testing.assert_close(normal.std(0, correction=0), torch.ones(3, 32))


def test_initialise_zeros(measured: tuple[Sensitivity, Tensor]) -> None:
    routers = Routers(LAYERS, 32)
    initialise(routers, RouterSpec(init="zeros"), measured[1], {}, 0.5)
    assert not routers.weight.any()
    assert not routers.bias.any()


@given(st.integers(1, 128), st.data())
def test_a_count_that_was_printed_as_a_share_comes_back(routed: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, routed))
    assert kept_count(kept / routed, routed) == kept
    assert kept_count(float(f"{kept / routed:.6f}"), routed) == kept
    if kept < routed:
        assert kept_count((kept + 0.01) / routed, routed) == kept + 1
