"""Conversations: what tuning, calibration and evaluation data become when read.

`mskip.compressor.records` yields records (JSON objects) from files, the embedded
prompts or the hub; the keys of a record say its format. Each record becomes a
`Conversation`, the one shape the rest of the project reads. Tokens and masks are
made in `mskip.compressor.encoding`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from mskip.compressor.errors import DataError
from mskip.compressor.records import read_records

Role = Literal["system", "user", "assistant"]
T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and the text verbatim."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns (`messages`), or a plain document (`text`), or a plain prompt with what follows it.

    A plain `prompt` is read as it stands, without a chat template; `text` is then its
    completion, and None leaves that to the dense model.

    Raises:
        ValueError: turns and something plain are given, or neither.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None or self.prompt is not None):
            raise ValueError("a conversation has either messages or text")

    @property
    def answered(self) -> bool:
        """There is something to score: a last assistant turn, a completion, or half a document."""
        return self.messages[-1].role == "assistant" if self.messages else self.text is not None


def read_conversations(
    source: str,
    *,
    split: str = "train",
    max_samples: int | None = None,
    trust_remote_code: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> list[Conversation]:
    """Read the conversations of ``source``, no further than ``max_samples`` needs.

    The order is the source's own, or that of a shuffle buffer; a mixture's parts are drawn
    at random by ``seed``. docs/data.md shows each format's record, prompt and answer.

    A conversation begins at its first user turn (after any system message). One in
    ``messages`` that ends with a user turn is unanswered; a ShareGPT log is cut to its
    last assistant turn, as its end is where somebody stopped scraping, and ends before
    its first turn without text.
    Records with no user turn are left out, and so are ShareGPT logs with a Bing turn.

    Args:
        source: "embedded:prompts"; a short name of `mskip.compressor.catalog`; a .jsonl
            file (one object a line); a .json file (a list of objects); a .txt file
            (documents separated by blank lines); or the id of a data set on the Hugging
            Face hub.
        split: the split of a hub data set; files have none.
        max_samples: stop after this many conversations; None reads all.
        trust_remote_code: let a hub data set run its own code, where the installed
            ``datasets`` still can (it cannot from version 4 on).
        shuffle_buffer: records held to choose the next one from; 0 for no shuffle, and at
            least the source's length for a full one.
        seed: of the shuffle and of a mixture's draws.

    Raises:
        DataError: missing, empty, malformed or of an unknown format; names file and line.
        ValueError: ``max_samples`` below 1 or ``shuffle_buffer`` below 0.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError("max_samples must be at least 1")
    conversations: list[Conversation] = []
    seen = 0
    for where, record in read_records(
        source, split, trust_remote_code, shuffle_buffer=shuffle_buffer, seed=seed
    ):
        seen += 1
        conversation = _conversation(record, where)
        if conversation is not None:
            conversations.append(conversation)
        if len(conversations) == max_samples:
            break
    if not seen:
        raise DataError(f"{source} is empty.", f"Put at least one record in it. {_FORMATS_HELP}")
    if not conversations:
        raise DataError(
            f"{source} has no usable record: none of its {seen} has a user turn with text.",
            _FORMATS_HELP,
        )
    return conversations


def split_samples(
    items: Sequence[T], calibration: int, held_out: int, seed: int
) -> tuple[list[T], list[T], list[T]]:
    """Shuffle by ``seed`` and cut into three disjoint lists: tune, calibration, held-out.

    The held-out items depend only on ``items``, ``held_out`` and ``seed``, so that
    figures stay comparable when another number of items is used for calibration.

    Args:
        items: the samples; not changed.
        calibration: how many go to calibration.
        held_out: how many are held out.
        seed: of the shuffle.

    Raises:
        DataError: nothing would be left to tune on.
        ValueError: a negative count.
    """
    if calibration < 0 or held_out < 0:
        raise ValueError("calibration and held_out must not be negative")
    needed = calibration + held_out + 1
    if len(items) < needed:
        raise DataError(
            f"{len(items)} samples are too few: data.calibration = {calibration} and "
            f"data.held_out = {held_out} with at least one left for tuning need {needed}.",
            "Lower data.calibration or data.held_out, or give more data.",
        )
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    reserved = held_out + calibration
    return shuffled[reserved:], shuffled[held_out:reserved], shuffled[:held_out]


# -- formats: one function each, chosen by the key that marks it -------------------------------


def _conversation(record: object, where: str) -> Conversation | None:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a record must be an object, not {_kind(record)}.", _FORMATS_HELP)
    present = [key for key in _FORMATS if key in record]
    if not present:
        keys = ", ".join(repr(key) for key in record) or "none"
        raise DataError(f"{where}: unknown format; the record's keys: {keys}.", _FORMATS_HELP)
    # A hub table gives every row every column: None there means "not in this row".
    key = next((key for key in present if record[key] is not None), present[0])
    return _FORMATS[key](record, where)


def _from_messages(record: Mapping[str, Any], where: str) -> Conversation | None:
    turns = _turns(record, "messages", "role", "content", where)
    return _from_first_user(
        [Message(role, _text(turn, "content", place)) for place, role, turn in turns]
    )


def _from_sharegpt(record: Mapping[str, Any], where: str) -> Conversation | None:
    # The paper's public converter leaves these logs out, too (its other roles are in _ROLES).
    turns = record["conversations"] if isinstance(record["conversations"], list) else []
    if any(isinstance(turn, Mapping) and turn.get("from") == "bing" for turn in turns):
        return None
    messages = []
    for place, role, turn in _turns(record, "conversations", "from", "value", where):
        text = _optional_text(turn, "value", place)
        if text:
            messages.append(Message(role, text))
        elif role != "system":
            # Scraped logs hold turns whose text was lost (in 2 of 1500 records tried); what
            # follows such a turn answers nothing that can be seen, so the log ends before it.
            break
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    conversation = _from_first_user(messages[: answers[-1] + 1] if answers else messages)
    # A log of leading assistant turns only has nothing left after the cut.
    return conversation if conversation or not answers else _from_first_user(messages)


def _from_alpaca(record: Mapping[str, Any], where: str) -> Conversation | None:
    request = _text(record, "instruction", where)
    if extra := _optional_text(record, "input", where):
        request = f"{request}\n\n{extra}"
    return _single_turn(request, _optional_text(record, "output", where))


def _from_pair(record: Mapping[str, Any], where: str, asked: str) -> Conversation | None:
    answered = _PAIRS[asked]
    if answered not in record:
        raise DataError(
            f"{where}: {asked!r} stands without {answered!r}.",
            f"Add {answered!r}; null leaves the answer to the dense model.",
        )
    return _single_turn(_text(record, asked, where), _optional_text(record, answered, where))


def _single_turn(request: str, answer: str) -> Conversation:
    asked = Message("user", request)
    return Conversation((asked, Message("assistant", answer)) if answer else (asked,))


def _from_prompt(record: Mapping[str, Any], where: str) -> Conversation | None:
    completion = _optional_text(record, "completion", where)
    return Conversation(prompt=_text(record, "prompt", where), text=completion or None)


def _from_text(record: Mapping[str, Any], where: str) -> Conversation | None:
    return Conversation(text=_text(record, "text", where))


_PAIRS = {"query": "response", "question": "answer"}
# In order of precedence: Alpaca on the hub also carries a rendered `text`.
_FORMATS: dict[str, Callable[[Mapping[str, Any], str], Conversation | None]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
    **{asked: partial(_from_pair, asked=asked) for asked in _PAIRS},
    "prompt": _from_prompt,
    "text": _from_text,
}
_FORMATS_HELP = (
    "A record has 'messages' (role, content), 'conversations' (from, value), "
    "'instruction' (with 'input' and 'output'), 'query' and 'response', 'question' and "
    "'answer', 'prompt' (with 'completion'), or 'text'."
)
_ROLES: dict[str, dict[str, Role]] = {
    "role": {"system": "system", "user": "user", "assistant": "assistant"},
    "from": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bard": "assistant",
        "assistant": "assistant",
    },
}


def _turns(
    record: Mapping[str, Any], key: str, role_key: str, text_key: str, where: str
) -> Iterator[tuple[str, Role, Mapping[str, Any]]]:
    """The turns under ``key`` as (where, role, turn), with both fields known to be there."""
    turns = record[key]
    if not isinstance(turns, list):
        raise DataError(f"{where}: {key!r} must be a list, not {_kind(turns)}.", _FORMATS_HELP)
    roles = _ROLES[role_key]
    for index, turn in enumerate(turns):
        place = f"{where}: {key}[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} must be an object, not {_kind(turn)}.", _FORMATS_HELP)
        if role_key not in turn or text_key not in turn:
            raise DataError(f"{place} needs {role_key!r} and {text_key!r}.", _FORMATS_HELP)
        role = turn[role_key]
        if not isinstance(role, str):
            raise DataError(f"{place}: {role_key!r} must be text, not {_kind(role)}.")
        if role not in roles:
            raise DataError(
                f"{place}: unknown role {role!r}.", f"{role_key!r} is one of {', '.join(roles)}."
            )
        yield place, roles[role], turn


def _from_first_user(messages: Sequence[Message]) -> Conversation | None:
    """From the first user turn on; system messages before it stay. None without a user turn."""
    roles = [message.role for message in messages]
    if "user" not in roles:
        return None
    first = roles.index("user")
    system = [message for message in messages[:first] if message.role == "system"]
    return Conversation((*system, *messages[first:]))


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    text = _optional_text(record, key, where)
    if not text:
        raise DataError(f"{where}: {key!r} is empty.", "Fill it in or delete the record.")
    return text


def _optional_text(record: Mapping[str, Any], key: str, where: str) -> str:
    """The text under ``key`` verbatim; "" when absent, null or blank."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, not {_kind(value)}.", _FORMATS_HELP)
    try:
        value.encode()
    except UnicodeEncodeError:
        # "\ud83d" is legal JSON, but no tokenizer takes half a character.
        raise DataError(
            f"{where}: {key!r} holds half of a surrogate pair.", "Mend or delete the record."
        ) from None
    return value if value.strip() else ""


def _kind(value: object) -> str:
    """The JSON word for a value's type."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
