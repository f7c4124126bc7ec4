"""Text as it comes is the text of all tokens, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mskip.exporters.serving.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def stream(tokenizer: Any, text: str, stop: list[str]) -> tuple[TextStream, list[str]]:
    """The stream after all tokens of a text, and its pieces."""
    made = TextStream(lambda tokens: str(tokenizer.decode(tokens)), stop)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [made.add(token) for token in tokens]
    return made, [*pieces, made.rest()]


def test_text_is_held_back_inside_a_character(tokenizer: Any) -> None:
    made, pieces = stream(tokenizer, "aé€b", [])
    assert "".join(pieces) == made.text == "aé€b"
    assert "" in pieces[:-1]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    made = TextStream(lambda tokens: str(tokenizer.decode(tokens)))
    made.add(tokenizer("€", add_special_tokens=False)["input_ids"][0])
    assert made.rest() == made.text == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab é€\n", max_size=40),
    stop=st.lists(st.text(alphabet="ab é€\n", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_at_the_stop_string_that_is_complete_first(
    tokenizer: Any, text: str, stop: list[str]
) -> None:
    """Of several that one token completes, at the one that begins first."""
    made, pieces = stream(tokenizer, text, stop)
    expected = text
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[:count])
        found = [at for at in (before.find(each) for each in stop) if at >= 0]
        if found:
            expected = before[: min(found)]
            break
    assert made.stopped == any(each in text for each in stop)
    assert "".join(pieces) == made.text == expected


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Any) -> None:
    made = TextStream(lambda tokens: "".join(chr(token) for token in tokens), ["xyz"])
    assert [made.add(ord(each)) for each in "axyaxybxyz!"] == [
        "a", "", "", "xya", "", "", "xyb", "", "", "", "",
    ]  # fmt: skip
    assert made.stopped
    assert made.text == "axyaxyb"


def test_only_the_last_tokens_are_decoded() -> None:
    widths: list[int] = []

    def decode(tokens: list[int]) -> str:
        widths.append(len(tokens))
        return "".join(chr(token) for token in tokens)

    made = TextStream(decode)
    for _ in range(100):
        made.add(ord("a"))
    assert made.text == "a" * 100
    assert max(widths) == 2
