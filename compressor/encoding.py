"""Tokens and masks: a conversation as token ids, and samples as one padded batch.

The router decides from prompt positions only and the loss scores answer
positions only, so the boundary between the two is made here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from mskip.compressor.data import Conversation, Message
from mskip.compressor.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch: TypeAlias = dict[str, torch.Tensor]
"""What `collate` returns."""


@dataclass(frozen=True)
class Sample:
    """One sequence: the prompt is [0, prompt_length), the answer is the rest (may be empty).

    Raises:
        ValueError: not 1 <= prompt_length <= len(input_ids).
    """

    input_ids: list[int]
    prompt_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.input_ids):
            raise ValueError(
                f"prompt_length {self.prompt_length} is not in 1..{len(self.input_ids)}"
            )


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sample | None:
    """Token ids of a conversation, at most ``max_length`` of them.

    With a chat template the prompt is the template of everything before the last
    assistant turn plus its generation prompt, and the answer is what the template
    prints after that, to the end-of-turn token. Without one, the turns stand under
    "### Instruction:" and "### Response:" headings as in Stanford Alpaca. The prompt's
    ids are those of the prompt tokenised alone: what a server sees is what the router
    was tuned on.

    A plain prompt and its completion stand as they are, between no marks. A document is cut
    to ``max_length``; the first half of its tokens (rounded down, at
    least 1) is the prompt and the rest the answer. Neither gets an end token.

    Too long: the answer is cut at its end. A prompt is never cut, as every cut breaks
    the template or the request. Where it leaves no room for one answer token, an
    answered conversation is ended at an earlier answer of its own, the latest that
    fits; where none does, or it is unanswered, it is dropped.

    Args:
        conversation: what to encode.
        tokenizer: with or without a chat template.
        max_length: in tokens, prompt and answer together.

    Returns:
        The sample, or None when it is dropped: every prompt exceeds ``max_length - 1``
        tokens, or the text has no tokens. The caller counts these.

    Raises:
        DataError: the chat template refuses the turns.
    """
    if conversation.prompt is not None:
        texts = conversation.prompt, conversation.text or ""
        return _encode_pair(_opening(tokenizer), *texts, tokenizer, max_length)
    if conversation.text is not None:
        ids = _opening(tokenizer) + _ids(tokenizer, conversation.text)
        ids = ids[:max_length]
        return Sample(ids, max(1, len(ids) // 2)) if ids else None
    messages = conversation.messages
    while messages:
        sample = _encode_turns(messages, tokenizer, max_length)
        if sample is not None or not conversation.answered:
            return sample
        messages = _to_previous_answer(messages)
    return None


def collate(
    samples: Sequence[Sample], pad_id: int, *, padding_side: Literal["left", "right"] = "right"
) -> Batch:
    """Pad samples to the longest and mark prompt and answer.

    Args:
        samples: at least one.
        pad_id: token id that fills the padding.
        padding_side: where the padding goes.

    Returns:
        Five tensors, [batch, sequence] each:
            input_ids: int64, ``pad_id`` on padding.
            attention_mask: int64, 1 on real tokens, 0 on padding.
            position_ids: int64, counted from 0 over the real tokens, 0 on padding.
            prompt_mask: bool, True exactly on the prompt's tokens.
            answer_mask: bool, True where the *next* token is an answer token: score
                ``logits[:, t]`` against ``input_ids[:, t + 1]`` at these t. False in the
                last column, and throughout a row without an answer.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("collate needs at least one sample")
    shape = len(samples), max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    prompt_mask = torch.zeros(shape, dtype=torch.bool)
    answer_mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        start = shape[1] - length if padding_side == "left" else 0
        answer = start + sample.prompt_length
        stop = start + length
        input_ids[row, start:stop] = torch.tensor(sample.input_ids)
        attention_mask[row, start:stop] = 1
        position_ids[row, start:stop] = torch.arange(length)
        prompt_mask[row, start:answer] = True
        answer_mask[row, answer - 1 : stop - 1] = True
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "prompt_mask": prompt_mask,
        "answer_mask": answer_mask,
    }


@dataclass(frozen=True)
class Frame:
    """What surrounds a request of one user turn, for those who have no chat template at hand.

    Attributes:
        opening: token ids before a text that is no chat.
        chat_opening: token ids before a chat.
        before: text before the request.
        after: text after it, up to where the answer begins.
    """

    opening: list[int]
    chat_opening: list[int]
    before: str
    after: str


def request_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame with which ``before + request + after`` encodes as `encode` does.

    Raises:
        DataError: the chat template changes the request, or refuses it.
    """
    mark = "mskip-request"
    messages = (Message("user", mark),)
    opening = _opening(tokenizer)
    if tokenizer.chat_template:
        chat_opening, text = list[int](), _templated(messages, tokenizer)[0]
    else:
        chat_opening, text = opening, _headed(messages, tokenizer)[0]
    if text.count(mark) != 1:
        raise DataError(
            "the tokenizer's chat template does not print a request once, as it is.",
            "Use a template that does.",
        )
    before, after = text.split(mark)
    return Frame(opening, chat_opening, before, after)


# -- turns to ids -----------------------------------------------------------------------------


def _encode_turns(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sample | None:
    """The sample of exactly these turns; None when the prompt leaves no room for an answer."""
    if tokenizer.chat_template:
        # The template prints BOS itself where the model wants one: a second is never added.
        opening: list[int] = []
        prompt, answer = _templated(messages, tokenizer)
    else:
        opening = _opening(tokenizer)
        prompt, answer = _headed(messages, tokenizer)
    return _encode_pair(opening, prompt, answer, tokenizer, max_length)


def _encode_pair(
    opening: list[int],
    prompt: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Sample | None:
    """The sample of two texts; None when the prompt leaves no room for an answer."""
    prompt_ids = opening + _ids(tokenizer, prompt)
    if not 1 <= len(prompt_ids) <= max_length - 1:
        return None
    if not answer:
        return Sample(prompt_ids, len(prompt_ids))
    # Tokenised together where that leaves the prompt's ids alone (SentencePiece puts a space
    # before a text on its own), apart where a merge would reach across the boundary.
    ids = opening + _ids(tokenizer, prompt + answer)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _ids(tokenizer, answer)
    return Sample(ids[:max_length], len(prompt_ids))


def _to_previous_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns up to the last assistant turn but one; () when there is only one."""
    earlier = [i for i, message in enumerate(messages[:-1]) if message.role == "assistant"]
    return messages[: earlier[-1] + 1] if earlier else ()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the length is ours to watch, not the tokenizer's to warn about.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts one before a text of its own accord, else nothing.

    Asked for apart from the text, since some tokenizers close with EOS as well.
    """
    added = list(tokenizer("")["input_ids"])
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


# -- turns to text ----------------------------------------------------------------------------


def _templated(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer ("" when unanswered) by the tokenizer's chat template."""
    from jinja2 import TemplateError

    # Some templates (Gemma 2, Mistral) refuse a system message, or two turns of one role.
    for candidate in (messages, _alternating(messages)):
        try:
            return _template_parts(candidate, tokenizer)
        except TemplateError as error:
            refusal = error
    roles = ", ".join(message.role for message in messages)
    raise DataError(
        f"the tokenizer's chat template refuses a conversation ({roles}): {refusal}",
        "Change or remove the conversation, or use the model's own chat template.",
    ) from refusal


def _template_parts(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    asked, content = _answer_apart(messages)
    prompt = _template(asked, tokenizer, add_generation_prompt=True)
    if not content:
        return prompt, ""
    whole = _template(messages, tokenizer, add_generation_prompt=False)
    # rstrip: a template prints a newline after the end of a turn, a model stops before it.
    answer = whole[len(prompt) :].rstrip()
    bare = content.strip()
    if whole.startswith(prompt) and bare in answer and answer.strip() != bare:
        return prompt, answer
    # The template prints a past answer otherwise than it asks for one (reasoning models),
    # or closes the turn with nothing.
    return prompt, content + str(tokenizer.eos_token or "")


def _template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _headed(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer ("" when unanswered) in the manner of Stanford Alpaca."""
    asked, content = _answer_apart(messages)
    preamble = "Here is a request. Write a response that fulfils it."
    parts = {"user": "### Instruction:\n{}", "assistant": "### Response:\n{}", "system": "{}"}
    blocks = [parts[message.role].replace("{}", message.content) for message in asked]
    if asked[0].role != "system":
        blocks.insert(0, preamble)
    prompt = "\n\n".join([*blocks, "### Response:\n"])
    return prompt, content + str(tokenizer.eos_token or "") if content else ""


def _answer_apart(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    if messages[-1].role == "assistant":
        return messages[:-1], messages[-1].content
    return messages, ""


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """User and assistant by turns: a system message becomes the head of the user turn after it."""
    turns = [Message("user", m.content) if m.role == "system" else m for m in messages]
    return [
        Message(role, "\n\n".join(turn.content for turn in group))
        for role, group in groupby(turns, key=lambda turn: turn.role)
    ]
