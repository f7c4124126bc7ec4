"""What of a call counts as the prompt that decides."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from by_hand import Prompts, inputs, prefill
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mskip.compressor.encoding import Batch, Sample, collate
from mskip.compressor.errors import ModelError
from mskip.compressor.skipping import MindSkip


def test_arguments_by_position_are_understood(skip: MindSkip, batch: Batch) -> None:
    named = skip.model(**inputs(batch))
    cache = skip.cache()
    output = skip.model(*inputs(batch).values(), cache)
    assert output.past_key_values is cache
    assert torch.equal(cache.scores, named.past_key_values.scores)
    assert torch.equal(output.logits, named.logits)


def test_embeddings_are_as_good_as_ids(skip: MindSkip, batch: Batch) -> None:
    by_ids = skip.model(**inputs(batch))
    rest = {**inputs(batch), "inputs_embeds": skip.model.get_input_embeddings()(batch["input_ids"])}
    del rest["input_ids"]
    output = skip.model(**rest)
    assert torch.equal(output.logits, by_ids.logits)
    assert torch.equal(output.past_key_values.scores, by_ids.past_key_values.scores)
    embeddings = rest["inputs_embeds"][:1]
    bare = skip.model(inputs_embeds=embeddings), skip.model(batch["input_ids"][:1])
    assert torch.equal(bare[0].past_key_values.scores, bare[1].past_key_values.scores)


def test_without_a_mask_every_position_is_prompt(skip: MindSkip, prompt_batch: Prompts) -> None:
    ids = prompt_batch([6, 6, 6])["input_ids"]
    bare = skip.model(ids)
    masked = skip.model(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(bare.past_key_values.scores, masked.past_key_values.scores)


def test_four_dimensional_mask_is_refused(skip: MindSkip, batch: Batch) -> None:
    mask = torch.ones(8, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="two-dimensional attention mask"):
        skip.model(batch["input_ids"], attention_mask=mask)


prompts = st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=10), min_size=1, max_size=4)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompt=st.lists(st.integers(3, 96), min_size=1, max_size=12),
    mates=prompts,
    padding=st.integers(0, 9),
    side=st.sampled_from(["left", "right"]),
    place=st.integers(0, 4),
    pad_id=st.integers(0, 96),
)
def test_neither_padding_nor_batch_mates_change_a_decision(
    skip: MindSkip,
    *,
    prompt: list[int],
    mates: list[list[int]],
    padding: int,
    side: Literal["left", "right"],
    place: int,
    pad_id: int,
) -> None:
    alone = skip.model(torch.tensor([prompt])).past_key_values
    place = min(place, len(mates))
    chosen = [*mates[:place], prompt, *mates[place:]]
    filler = [3] * (max(map(len, chosen)) + padding)  # a row that sets the width
    samples = [Sample(ids, len(ids)) for ids in [*chosen, filler]]
    together = prefill(skip, collate(samples, pad_id, padding_side=side))
    margins = (alone.scores[0] - 0.5).abs()
    for index, margin in enumerate(margins):
        # 1e-5 is what float32 rounding may do; a decision above changes what is scored below.
        torch.testing.assert_close(
            together.scores[place, index], alone.scores[0, index], rtol=0, atol=1e-5
        )
        if margin <= 1e-5:
            break
        assert together.decisions[place, index] == alone.decisions[0, index]
