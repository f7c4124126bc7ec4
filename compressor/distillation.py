"""Answers written by the dense model itself, for prompts that have none.

Self-distillation needs no text of uncertain licence, and it asks the right
question: does the routed model say what the dense model would have said?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mskip.compressor.encoding import Sample, collate
from mskip.compressor.models import BaseModel


@torch.no_grad()
def answer_prompts(
    base: BaseModel,
    samples: Sequence[Sample],
    new_tokens: int,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Complete every unanswered sample with the dense model's greedy answer.

    Args:
        base: the dense model.
        samples: encoded prompts; answered ones are returned as they are.
        new_tokens: longest answer, in tokens; it ends early at end-of-sequence.
        batch_size: prompts per generation.
        progress: called with (done, total) prompts.

    Returns:
        As many samples, in the order given.
    """
    pad_id = int(base.tokenizer.pad_token_id)
    ends = base.model.generation_config.eos_token_id
    end_ids = set(ends if isinstance(ends, list) else [ends])
    done = list(samples)
    # Alike lengths together: padding is computed for nothing.
    todo = sorted(
        (i for i, s in enumerate(samples) if s.prompt_length == len(s.input_ids)),
        key=lambda i: len(samples[i].input_ids),
    )
    for start in range(0, len(todo), batch_size):
        chosen = todo[start : start + batch_size]
        batch = collate([samples[i] for i in chosen], pad_id, padding_side="left")
        output = base.model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"].to(base.model.device),
            attention_mask=batch["attention_mask"].to(base.model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            # A penalty in the model's own generation settings would bend "greedy".
            repetition_penalty=1.0,
            pad_token_id=pad_id,
        )
        width = batch["input_ids"].shape[1]
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            stop = next((t + 1 for t, token in enumerate(row) if token in end_ids), len(row))
            prompt = samples[i].input_ids
            done[i] = Sample(prompt + row[:stop], len(prompt))
        if progress is not None:
            progress(min(start + batch_size, len(todo)), len(todo))
    return done
