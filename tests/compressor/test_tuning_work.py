"""What a step of tuning does not compute: what cannot change, and what is multiplied by zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from router_tuning import LAYERS, assert_same_outcome, spec, start
from torch import Tensor

from mskip.compressor.encoding import Sample, collate
from mskip.compressor.loss import RelaxedPass
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import straight_through_gate
from mskip.compressor.patching import patched
from mskip.compressor.routing import Call
from mskip.compressor.segments import SplitModel
from mskip.compressor.stems import StemStore
from mskip.compressor.tuning import tune

MakeSamples = Callable[..., list[Sample]]


def test_no_backward_below_the_first_routed_layer(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    samples = make_samples(16)
    routers, price = start(base, LAYERS, samples, 0.5)
    seen: dict[int, set[bool]] = {layer: set() for layer in range(6)}
    hooks = [
        block.register_forward_hook(
            lambda _, __, output, layer=layer: seen[layer].add(output.requires_grad)
        )
        for layer, block in enumerate(base.model.model.layers)
    ]
    hooks.append(
        base.model.model.layers[2].self_attn.register_forward_hook(
            lambda _, __, output: seen.setdefault(-1, set()).add(output[0].requires_grad)
        )
    )
    tune(base, routers, samples, spec(max_steps=2), 0.5, tmp_path, start_price=price)
    for hook in hooks:
        hook.remove()
    assert seen[0] == seen[1] == {False}
    assert seen[2] == {False, True}  # the dense pass and the student's
    assert seen[5] == {False, True}


def test_shut_attentions_are_run_but_not_differentiated(
    base: BaseModel, make_samples: MakeSamples
) -> None:
    """Every row is executed, those with an open gate alone with a graph; the gradients are the
    same as of all rows with a graph, since a shut gate multiplies by zero."""
    batch = collate(make_samples(6, prompt=(3, 12)), 0)
    routers, _ = start(base, LAYERS, make_samples(16), 0.5)
    # Every second gate open, in rows and in layers, whatever the router says.
    noise = 20.0 * (-1) ** torch.arange(6)[:, None].add(torch.arange(len(LAYERS)))
    split = SplitModel(base.model, LAYERS[0])
    stem = split.stem(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    seen: list[tuple[bool, int]] = []
    hooks = [
        base.model.model.layers[layer].self_attn.o_proj.register_forward_hook(
            lambda _, __, output: seen.append((output.requires_grad, len(output)))
        )
        for layer in LAYERS[1:]  # nothing below the first one's is differentiated
    ]

    class Everything(RelaxedPass):
        """Both ways for all rows, with a graph."""

        def __call__(self, call: Call) -> Tensor:
            logit = self.routers.logit(call.index, call.hidden, self.prompt_mask)
            assert self.noise is not None
            noisy = logit + self.noise[:, call.index]
            gate = straight_through_gate(noisy, self.temperature, None)[:, None, None]
            return call.execute(None) * gate + call.skip(None) * (1 - gate)

    found = {}
    with patched(base.model, LAYERS):
        for kind in (RelaxedPass, Everything):
            seen.clear()
            final = split.finish(stem, kind(routers, batch["prompt_mask"], 20.0, noise))
            real = final[batch["attention_mask"].bool()]
            loss = (real * torch.linspace(-1, 1, real.numel()).view_as(real)).sum()
            found[kind] = (real, *torch.autograd.grad(loss, [routers.weight, routers.bias]))
            rows = {graph: sum(n for with_graph, n in seen if with_graph is graph)
                    for graph in (True, False)}  # fmt: skip
            calls = 6 * len(LAYERS[1:])
            shut = calls // 2 if kind is RelaxedPass else 0
            assert rows == {True: calls - shut, False: shut}
    for hook in hooks:
        hook.remove()
    for ours, theirs in zip(found[RelaxedPass], found[Everything], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found[Everything][1].abs().max() > 1e-3


def test_the_head_of_the_dense_model_is_multiplied_once(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path
) -> None:
    """From the second epoch on the head sees the student's answers alone."""
    samples = make_samples(16, answer=(4, 4))
    seen: list[int] = []
    hook = base.model.lm_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    routers, price = start(base, LAYERS, samples, 0.5)
    seen.clear()
    wanted = spec(max_steps=-1, epochs=3.0)
    tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price)
    hook.remove()
    assert sum(seen) == (2 + 1 + 1) * 16 * 4


@pytest.fixture
def forwards(base: BaseModel) -> Iterator[dict[int, int]]:
    """How often each decoder layer has run."""
    counts = dict.fromkeys(range(6), 0)

    def counter(layer: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[layer] += 1

        return count

    hooks = [
        block.register_forward_hook(counter(layer))
        for layer, block in enumerate(base.model.model.layers)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def test_dense_activations_are_computed_once(
    base: BaseModel, make_samples: MakeSamples, tmp_path: Path, forwards: dict[int, int]
) -> None:
    """Two epochs of two batches: the lower layers run in the first alone."""
    samples = make_samples(16, prompt=(3, 12))
    outcomes, counts = [], []
    for cache in (2.0, 0.0):
        routers, price = start(base, LAYERS, samples, 0.5)
        forwards.update(dict.fromkeys(forwards, 0))
        wanted = spec(max_steps=-1, epochs=2.0, cache_gib=cache)
        outcomes.append(tune(base, routers, samples, wanted, 0.5, tmp_path, start_price=price))
        counts.append((forwards[0], forwards[1], forwards[5]))
    # Lower layers: once a batch. Upper layers: that, and the student's pass of every step.
    assert counts == [(2, 2, 2 + 4), (4, 4, 4 + 4)]
    assert_same_outcome(outcomes[0], outcomes[1], 1e-4)


def test_stem_store_gives_what_it_would_compute(base: BaseModel, make_samples: MakeSamples) -> None:
    """Samples kept from one batch come out right in another, with another padding."""
    samples = make_samples(6, prompt=(2, 12))
    split = SplitModel(base.model, 2)
    kept, recomputed = StemStore(split, samples, 2**30), StemStore(split, samples, 0)

    def batch(numbers: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        return collate([samples[number] for number in numbers], 0), torch.tensor(numbers)

    for numbers in ([0, 1, 2], [3, 4, 5]):
        kept.get(*batch(numbers))
    for numbers in ([4, 0], [5, 1, 3], [2]):
        rows, index = batch(numbers)
        ours, theirs = kept.get(rows, index), recomputed.get(rows, index)
        real = rows["attention_mask"].bool()
        torch.testing.assert_close(ours[0].hidden[real], theirs[0].hidden[real])
        torch.testing.assert_close(ours[1], theirs[1])
        torch.testing.assert_close(
            split.finish(ours[0])[rows["answer_mask"]], theirs[1], rtol=1e-5, atol=1e-5
        )
    assert kept.used > 0
    assert recomputed.used == 0


def test_stem_store_keeps_to_its_budget(base: BaseModel, make_samples: MakeSamples) -> None:
    samples = make_samples(6, prompt=(8, 8), answer=(4, 4))
    each = (12 + 4) * 32 * 4  # positions and answer tokens, hidden, bytes
    store = StemStore(SplitModel(base.model, 2), samples, 3 * each + 5)
    batch = collate(samples, 0)
    first = store.get(batch, torch.arange(6))
    assert store.used == 3 * each
    again = store.get(batch, torch.arange(6))
    assert store.used == 3 * each
    torch.testing.assert_close(first[1], again[1])
