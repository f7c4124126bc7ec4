"""Tokens and masks: the boundary between prompt and answer is exact, however it is padded."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mskip.compressor.data import Conversation, Message, read_conversations
from mskip.compressor.encoding import Sample, collate, encode
from mskip.compressor.errors import DataError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Tokenizers = dict[str, PreTrainedTokenizerFast]

# Gemma 2's manners: no system role, strict turns.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
KINDS = (
    "chatml",
    "with bos",
    "strict",
    "reasoning",
    "bare",
    "none",
    "none, closes",
    "none, adds nothing",
)


@pytest.fixture(scope="session")
def tokenizers(make_tokenizer: MakeTokenizer) -> Tokenizers:
    """One tokenizer of each of KINDS."""
    chatml = make_tokenizer()
    made = (
        chatml,
        make_tokenizer("{{ bos_token }}" + chatml.chat_template),
        make_tokenizer(STRICT),
        # Reasoning models' manners: a prompt opens a thought that no past answer shows.
        make_tokenizer(chatml.chat_template.replace("assistant\n", "think\n")),
        make_tokenizer(BARE),
        make_tokenizer(None),
        make_tokenizer(None, adds="both"),
        make_tokenizer(None, adds=""),
    )
    return dict(zip(KINDS, made, strict=True))


def turns(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs))


def parts(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The text of prompt and answer."""
    cut = sample.prompt_length
    return tokenizer.decode(sample.input_ids[:cut]), tokenizer.decode(sample.input_ids[cut:])


ASKED = turns(("user", "the question"), ("assistant", "one two"))


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [
        (
            "chatml",
            "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n",
            "one two<|im_end|>",
        ),
        (
            "with bos",
            "<s><|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n",
            "one two<|im_end|>",
        ),
        (
            "reasoning",
            "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>think\n",
            "one two<|im_end|>",
        ),
        ("bare", "user: the question\nassistant: ", "one two<|im_end|>"),
        (
            "none",
            "<s>Here is a request. Write a response that fulfils it.\n\n"
            "### Instruction:\nthe question\n\n### Response:\n",
            "one two<|im_end|>",
        ),
    ],
)
def test_prompt_and_answer(tokenizers: Tokenizers, kind: str, prompt: str, answer: str) -> None:
    sample = encode(ASKED, tokenizers[kind], 500)
    assert parts(sample, tokenizers[kind]) == (prompt, answer)


def test_answer_that_the_template_would_not_show_is_scored_whole(
    make_tokenizer: MakeTokenizer,
) -> None:
    # Reasoning models' manners: a past answer is shown without what the model thought.
    template = make_tokenizer().chat_template
    shown = "m['content'].split('</think>')[-1]"
    tokenizer = make_tokenizer(template.replace("m['content']", shown))
    conversation = turns(("user", "q"), ("assistant", "one</think>two"))
    assert parts(encode(conversation, tokenizer, 500), tokenizer)[1] == "one</think>two<|im_end|>"


def test_many_turns_without_a_template(tokenizers: Tokenizers) -> None:
    conversation = turns(
        ("system", "Be {brief}."),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    )
    prompt, answer = parts(encode(conversation, tokenizers["none"], 500), tokenizers["none"])
    assert prompt == (
        "<s>Be {brief}.\n\n### Instruction:\nq\n\n### Response:\na\n\n"
        "### Instruction:\nr\n\n### Response:\n"
    )
    assert answer == "b<|im_end|>"


def test_only_the_last_answer_is_the_answer(tokenizers: Tokenizers) -> None:
    conversation = turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    prompt, answer = parts(encode(conversation, tokenizers["chatml"], 500), tokenizers["chatml"])
    assert "a<|im_end|>" in prompt
    assert answer == "b<|im_end|>"


def test_strict_template_gets_the_system_message_in_the_first_user_turn(
    tokenizers: Tokenizers,
) -> None:
    tokenizer = tokenizers["strict"]
    conversation = turns(("system", "s"), ("user", "q"), ("user", "r"), ("assistant", "a"))
    assert parts(encode(conversation, tokenizer, 500), tokenizer) == (
        "<s><|im_start|>user\ns\n\nq\n\nr<|im_end|>\n<|im_start|>assistant\n",
        "a<|im_end|>",
    )


def test_template_that_refuses_is_a_user_error(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"refuses a conversation \(user, assistant\): never"):
        encode(ASKED, tokenizer, 500)


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_one_bos_and_one_end(tokenizers: Tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = encode(ASKED, tokenizer, 500).input_ids
    expected = 0 if kind in ("chatml", "reasoning", "bare", "none, adds nothing") else 1
    assert ids.count(tokenizer.bos_token_id) == expected
    assert ids[0] == tokenizer.bos_token_id or not expected
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id
    prompt = encode(Conversation(ASKED.messages[:1]), tokenizer, 500)
    assert prompt.input_ids[-1] != tokenizer.eos_token_id


content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
@given(question=content, answer=content)
def test_prompt_ids_are_those_of_the_prompt_alone(
    tokenizers: Tokenizers, kind: str, question: str, answer: str
) -> None:
    tokenizer = tokenizers[kind]
    whole = encode(turns(("user", question), ("assistant", answer)), tokenizer, 10_000)
    alone = encode(turns(("user", question)), tokenizer, 10_000)
    assert alone.prompt_length == len(alone.input_ids)
    assert whole.input_ids[: whole.prompt_length] == alone.input_ids
    assert len(whole.input_ids) > whole.prompt_length
    assert answer.strip() in parts(whole, tokenizer)[1]


def test_merge_across_the_boundary_leaves_the_prompt_alone(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["none"]
    # The prompt's last "\n" and the answer's first two are one token when they meet.
    assert len(tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]) == 1
    conversation = turns(("user", "q"), ("assistant", "\n\nthe answer"))
    whole = encode(conversation, tokenizer, 500)
    alone = encode(Conversation(conversation.messages[:1]), tokenizer, 500)
    assert whole.input_ids[: whole.prompt_length] == alone.input_ids
    assert parts(whole, tokenizer)[1] == "\n\nthe answer<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_too_long_cuts_the_answer_and_drops_a_prompt_without_room(
    tokenizers: Tokenizers, kind: str
) -> None:
    tokenizer = tokenizers[kind]
    full = encode(ASKED, tokenizer, 500)
    prompt = full.prompt_length
    assert encode(ASKED, tokenizer, len(full.input_ids)) == full
    for length in range(prompt + 1, len(full.input_ids)):
        assert encode(ASKED, tokenizer, length) == Sample(full.input_ids[:length], prompt)
    for length in (0, 1, prompt):
        assert encode(ASKED, tokenizer, length) is None
        assert encode(Conversation(ASKED.messages[:1]), tokenizer, length) is None
    alone = encode(Conversation(ASKED.messages[:1]), tokenizer, prompt + 1)
    assert alone == Sample(full.input_ids[:prompt], prompt)


def test_prompt_without_room_gives_way_to_the_latest_earlier_answer_that_fits(
    tokenizers: Tokenizers,
) -> None:
    tokenizer = tokenizers["with bos"]
    long = turns(
        ("system", "s"),
        *(("user", "q"), ("assistant", "a")),
        *(("user", "r"), ("assistant", "b")),
        *(("user", "the question " * 50), ("assistant", "c")),
    )
    full = [encode(Conversation(long.messages[:end]), tokenizer, 5000) for end in (3, 5, 7)]
    lengths = [sample.prompt_length for sample in full]
    assert encode(long, tokenizer, lengths[2] + 1).prompt_length == lengths[2]
    assert encode(long, tokenizer, lengths[2]) == full[1]
    assert encode(long, tokenizer, lengths[1]) == full[0]
    assert encode(long, tokenizer, lengths[0]) is None
    # A prompt is another prompt without its last question: never shortened.
    assert encode(Conversation(long.messages[:6]), tokenizer, lengths[2]) is None


def test_document_is_half_prompt_half_answer(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    text = "one two three the answer is the question"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert encode(Conversation(text=text), tokenizer, 500) == Sample(ids, len(ids) // 2)
    assert encode(Conversation(text=text), tokenizer, 5) == Sample(ids[:5], 2)
    assert encode(Conversation(text=text), tokenizer, 1) == Sample(ids[:1], 1)
    plain = tokenizers["none, adds nothing"]
    assert encode(Conversation(text="x"), plain, 500).prompt_length == 1
    closes = encode(Conversation(text=text), tokenizers["none, closes"], 500)
    assert closes.input_ids == ids


def test_plain_prompt_gets_no_template(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    prompt, completion = "the question is", " one two three"
    asked = tokenizer(prompt)["input_ids"]
    assert encode(Conversation(prompt=prompt), tokenizer, 500) == Sample(asked, len(asked))
    both = encode(Conversation(prompt=prompt, text=completion), tokenizer, 500)
    assert both.prompt_length == len(asked)
    assert tokenizer.decode(both.input_ids[1:]) == prompt + completion
    cut = encode(Conversation(prompt=prompt, text=completion), tokenizer, len(asked) + 1)
    assert cut == Sample(both.input_ids[: len(asked) + 1], len(asked))
    assert encode(Conversation(prompt=prompt, text=completion), tokenizer, len(asked)) is None


def test_document_without_tokens_is_dropped(tokenizers: Tokenizers) -> None:
    assert encode(Conversation(text=""), tokenizers["none, adds nothing"], 500) is None


def test_embedded_prompts_encode(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    samples = [encode(c, tokenizer, 4096) for c in read_conversations("embedded:prompts")]
    assert None not in samples


@pytest.mark.parametrize("prompt_length", [0, 3, -1])
def test_sample_refuses_a_boundary_outside(prompt_length: int) -> None:
    with pytest.raises(ValueError, match="prompt_length"):
        Sample([1, 2], prompt_length)


samples = st.integers(1, 12).flatmap(
    lambda length: st.builds(
        Sample,
        st.lists(st.integers(0, 99), min_size=length, max_size=length),
        st.integers(1, length),
    )
)


@pytest.mark.parametrize("side", ["left", "right"])
@given(batch=st.lists(samples, min_size=1, max_size=5), pad_id=st.integers(0, 99))
def test_masks_are_exact(side: str, batch: list[Sample], pad_id: int) -> None:
    tensors = collate(batch, pad_id, padding_side=side)
    width = max(len(sample.input_ids) for sample in batch)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "position_ids": torch.int64,
        "prompt_mask": torch.bool,
        "answer_mask": torch.bool,
    }
    assert all(tensor.shape == (len(batch), width) for tensor in tensors.values())
    for row, sample in enumerate(batch):
        length, cut = len(sample.input_ids), sample.prompt_length
        offset = width - length if side == "left" else 0
        for column in range(width):
            index = column - offset  # in the sample; outside 0..length-1 is padding
            real = 0 <= index < length
            got = {name: tensor[row, column].item() for name, tensor in tensors.items()}
            assert got == {
                "input_ids": sample.input_ids[index] if real else pad_id,
                "attention_mask": int(real),
                "position_ids": index if real else 0,
                "prompt_mask": real and index < cut,
                "answer_mask": real and cut <= index + 1 < length,
            }
        # What the docstring promises: those columns' next tokens are the answer.
        columns = tensors["answer_mask"][row].nonzero()[:, 0]
        scored = tensors["input_ids"][row, columns + 1].tolist()
        assert scored == sample.input_ids[cut:]


def test_collate_example() -> None:
    batch = collate([Sample([5, 6, 7, 8], 2), Sample([9], 1)], 0, padding_side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 0, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch["prompt_mask"].tolist() == [[True, True, False, False], [False] * 3 + [True]]
    assert batch["answer_mask"].tolist() == [[False, True, True, False], [False] * 4]


def test_collate_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)


def test_import_brings_torch_but_neither_transformers_nor_datasets() -> None:
    code = (
        "import sys, mskip.compressor.encoding\n"
        "assert not {'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
