"""Every format becomes the same conversation; every fault is one DataError with path and line."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mskip.compressor.data import Conversation, Message, read_conversations, split_samples
from mskip.compressor.errors import DataError


def turns(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs))


@pytest.fixture
def lines(tmp_path):
    """Write records as a .jsonl file and return its name."""

    def write(*records: object) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def share(*pairs: tuple[str, str | None]) -> dict:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in pairs]}


def chat(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": who, "content": text} for who, text in pairs]}


def test_alpaca_list(tmp_path):
    path = tmp_path / "alpaca.json"
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La.\n"},
        {"instruction": "Think.", "input": None, "output": " "},
        {"instruction": "Wait.", "text": "a rendered copy, as the hub's table has"},
    ]
    path.write_text(json.dumps(rows, indent=1))
    read = read_conversations(str(path))
    assert read == [
        turns(("user", "Add.\n\n1, 2"), ("assistant", "3")),
        turns(("user", "Sing."), ("assistant", "La.\n")),
        turns(("user", "Think.")),
        turns(("user", "Wait.")),
    ]
    assert [conversation.answered for conversation in read] == [True, True, False, False]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ([("human", "q"), ("gpt", "a")], [("user", "q"), ("assistant", "a")]),
        ([("user", "q"), ("assistant", "a")], [("user", "q"), ("assistant", "a")]),
        (
            [("system", "s"), ("gpt", "hello"), ("human", "q"), ("gpt", "a")],
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ([("gpt", "x"), ("gpt", "y"), ("human", "q")], [("user", "q")]),
        (
            [("human", "q"), ("gpt", "a"), ("human", "r")],
            [("user", "q"), ("assistant", "a")],
        ),
        ([("human", "q"), ("human", "r")], [("user", "q"), ("user", "r")]),
        (
            [("human", "q"), ("gpt", "a"), ("human", ""), ("gpt", "b")],
            [("user", "q"), ("assistant", "a")],
        ),
        ([("human", "q"), ("gpt", None)], [("user", "q")]),
        ([("human", "q"), ("chatgpt", "a")], [("user", "q"), ("assistant", "a")]),
        ([("human", "q"), ("bard", "a")], [("user", "q"), ("assistant", "a")]),
        (
            [("system", ""), ("human", "q"), ("system", None), ("gpt", "a")],
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_sharegpt_list(tmp_path, record, expected):
    path = tmp_path / "share.json"
    path.write_text(json.dumps([share(*record)]))
    assert read_conversations(str(path)) == [turns(*expected)]


def test_a_log_with_another_assistant_is_left_out(lines):
    logs = [share(("human", "q"), ("bing", "a"), ("nobody", "")), share(("human", "q"))]
    assert read_conversations(lines(*logs)) == [turns(("user", "q"))]


@pytest.mark.parametrize(("asked", "answered"), [("query", "response"), ("question", "answer")])
def test_pairs(lines, asked, answered):
    read = read_conversations(
        lines(
            {asked: "q", answered: "a\n", "text": "beside it", "type": "x"},
            {asked: "r", answered: None},
            {asked: "s", answered: " "},
        )
    )
    assert read == [turns(("user", "q"), ("assistant", "a\n")), *(turns(("user", t)) for t in "rs")]


def test_messages_lines(lines):
    read = read_conversations(
        lines(
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
            chat(("user", "q"), ("assistant", "a"), ("user", "r")),
            chat(("system", "s"), ("user", "q")),
        )
    )
    assert read == [
        turns(("system", "s"), ("user", "q"), ("assistant", "a")),
        turns(("user", "q"), ("assistant", "a"), ("user", "r")),
        turns(("system", "s"), ("user", "q")),
    ]
    assert [conversation.answered for conversation in read] == [True, False, False]


def test_plain_text(tmp_path, lines):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert read_conversations(str(path)) == [
        Conversation(text="one\ntwo"),
        Conversation(text="three"),
    ]
    read = read_conversations(lines({"text": " kept as it is\n"}))
    assert read == [Conversation(text=" kept as it is\n")]
    assert read[0].answered


def test_a_plain_prompt(lines):
    """Read as it stands, with a completion or none; beside a `text` it counts."""
    read = read_conversations(
        lines(
            {"prompt": "Q: 1 + 1?\nA:", "completion": " 2"},
            {"prompt": "Once", "text": "a rendered copy"},
            {"prompt": "Twice", "completion": ""},
        )
    )
    assert read == [
        Conversation(prompt="Q: 1 + 1?\nA:", text=" 2"),
        Conversation(prompt="Once"),
        Conversation(prompt="Twice"),
    ]
    assert [conversation.answered for conversation in read] == [True, False, False]


def test_a_null_column_does_not_say_the_format(lines):
    row = {"messages": None, "instruction": "q", "output": "a", "text": None}
    assert read_conversations(lines(row)) == [turns(("user", "q"), ("assistant", "a"))]


def test_records_without_a_user_turn_are_left_out(lines):
    unusable = [share(("gpt", "a")), share(("human", ""), ("gpt", "a")), chat(("system", "s"))]
    assert len(read_conversations(lines(*unusable, chat(("user", "q"))))) == 1
    with pytest.raises(DataError, match=r"no usable record: none of its 3 "):
        read_conversations(lines(*unusable))


def test_max_samples_counts_conversations_and_reads_no_further(lines):
    source = lines(share(), {"text": "a"}, {"text": "b"}, {"unknown": 1})
    assert [c.text for c in read_conversations(source, max_samples=2)] == ["a", "b"]
    with pytest.raises(DataError, match="unknown format"):
        read_conversations(source, max_samples=3)
    with pytest.raises(ValueError, match="max_samples"):
        read_conversations(source, max_samples=0)


def test_a_shuffle_takes_from_the_whole_buffer(lines):
    source = lines(*({"text": str(number)} for number in range(40)))
    order = {"shuffle_buffer": 40, "seed": 5}
    read = read_conversations(source, max_samples=10, **order)
    assert read == read_conversations(source, max_samples=10, **order)
    assert read == read_conversations(source, **order)[:10]
    assert max(int(each.text) for each in read) >= 10
    with pytest.raises(ValueError, match="at least 1"):
        read_conversations(source, shuffle_buffer=-1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a record must be an object, not a list"),
        ("a", "a record must be an object, not text"),
        (3.5, "a record must be an object, not a number"),
        (None, "a record must be an object, not null"),
        (True, "a record must be an object, not true or false"),
        ({}, "unknown format; the record's keys: none"),
        ({"asked": "q", "reply": "a"}, "unknown format; the record's keys: 'asked', 'reply'"),
        ({"messages": None}, "'messages' must be a list, not null"),
        ({"messages": "hi"}, "'messages' must be a list, not text"),
        ({"messages": ["hi"]}, "messages[0] must be an object, not text"),
        ({"messages": [{"from": "user"}]}, "messages[0] needs 'role' and 'content'"),
        ({"messages": [{"role": 1, "content": "q"}]}, "messages[0]: 'role' must be text"),
        (chat(("user", "q"), ("tool", "a")), "messages[1]: unknown role 'tool'"),
        (chat(("human", "q")), "messages[0]: unknown role 'human'"),
        (chat(("user", "q"), ("assistant", " ")), "messages[1]: 'content' is empty"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "'content' must be text, not a list"),
        ({"conversations": {}}, "'conversations' must be a list, not an object"),
        (share(("narrator", "q")), "conversations[0]: unknown role 'narrator'"),
        (share(("human", 7)), "conversations[0]: 'value' must be text, not a number"),
        ({"instruction": "\n", "output": "a"}, "'instruction' is empty"),
        ({"instruction": "q", "output": {"a": 1}}, "'output' must be text, not an object"),
        ({"instruction": "q", "input": 0}, "'input' must be text, not a number"),
        ({"query": "q"}, "'query' stands without 'response'"),
        ({"question": "q", "answers": ["a"]}, "'question' stands without 'answer'"),
        ({"query": "", "response": "a"}, "'query' is empty"),
        ({"question": "q", "answer": 3}, "'answer' must be text, not a number"),
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' is empty"),
        ({"text": "\ud83d"}, "'text' holds half of a surrogate pair"),
    ],
)
def test_every_fault_of_a_record_is_named_with_its_line(lines, record, message):
    source = lines({"text": "a good one"}, record)
    with pytest.raises(DataError) as fault:
        read_conversations(source)
    assert fault.value.message.startswith(f"{source}:2: ")
    assert message in fault.value.message


def test_unknown_format_and_role_name_what_is_known(lines):
    with pytest.raises(DataError) as fault:
        read_conversations(lines({"q": "a"}))
    for key in ("messages", "conversations", "instruction", "query", "question", "text"):
        assert f"'{key}'" in fault.value.remedy
    with pytest.raises(DataError) as fault:
        read_conversations(lines(share(("narrator", "q"))))
    assert "human" in fault.value.remedy


def test_line_of_a_record_in_a_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n{"text": "a"},\n\n{"text": ""}]')
    with pytest.raises(DataError, match=r"data\.json:4: 'text' is empty"):
        read_conversations(str(path))


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.jsonl", ""), ("a.txt", "\n")])
def test_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match="is empty"):
        read_conversations(str(path))


def test_embedded_prompts():
    read = read_conversations("embedded:prompts")
    assert len(read) == 256
    assert len(set(read)) == 256
    assert all(conversation.messages for conversation in read)
    assert read[:3] == read_conversations("embedded:prompts", max_samples=3)


def test_a_conversation_is_either_turns_or_text():
    with pytest.raises(ValueError, match="either"):
        Conversation()
    with pytest.raises(ValueError, match="either"):
        Conversation((Message("user", "q"),), "text")
    with pytest.raises(ValueError, match="either"):
        Conversation((Message("user", "q"),), prompt="text")


@given(st.lists(st.integers(), max_size=40), st.integers(0, 20), st.integers(0, 20), st.integers(0))
def test_split_is_a_partition(values, calibration, held_out, seed):
    items = list(enumerate(values))
    if len(items) <= calibration + held_out:
        with pytest.raises(DataError) as fault:
            split_samples(items, calibration, held_out, seed)
        for part in (
            f"{len(items)} samples",
            f"data.calibration = {calibration}",
            f"data.held_out = {held_out}",
            f"need {calibration + held_out + 1}",
        ):
            assert part in fault.value.message
        return
    tune, calibrate, held = parts = split_samples(items, calibration, held_out, seed)
    assert (len(calibrate), len(held)) == (calibration, held_out)
    assert len(tune) >= 1
    assert sorted(tune + calibrate + held) == items
    assert parts == split_samples(items, calibration, held_out, seed)


def test_split_shuffles_by_seed_and_holds_out_the_same_whatever_the_calibration():
    items = list(range(100))
    assert split_samples(items, 10, 10, 0) != split_samples(items, 10, 10, 1)
    assert split_samples(items, 10, 10, 0)[2] == split_samples(items, 30, 10, 0)[2]
    assert items == list(range(100))
    with pytest.raises(ValueError, match="negative"):
        split_samples(items, -1, 10, 0)


def test_import_brings_no_heavy_module():
    code = (
        "import sys, mskip.compressor.data\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
