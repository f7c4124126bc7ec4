"""Names stand for hub data sets, mixtures keep their weights, and the documentation agrees."""

import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from mskip.compressor import catalog
from mskip.compressor.data import Conversation, Message, read_conversations
from mskip.compressor.errors import DataError
from mskip.compressor.records import read_records

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ONE_TURN = (Message("user", "q {}"), Message("assistant", "a {}"))
MADE_UP = {
    "alpaca": {"instruction": "q {}", "input": "", "output": "a {}", "text": "rendered"},
    "evol-instruct": {
        "idx": "i",
        "conversations": [{"from": "human", "value": "q {}"}, {"from": "gpt", "value": "a {}"}],
    },
    "evol-instruct-70k": {"instruction": "q {}", "output": "a {}"},
    "evol-codealpaca": {"instruction": "q {}", "output": "a {}"},
    "sharegpt": {
        "id": "i",
        "conversations": [{"from": "human", "value": "q {}"}, {"from": "chatgpt", "value": "a {}"}],
    },
    "metamathqa": {"query": "q {}", "response": "a {}", "type": "t", "original_question": "o"},
    "slimorca": {
        "conversations": [
            {"from": "system", "value": "", "weight": None},
            {"from": "human", "value": "q {}", "weight": 0.0},
            {"from": "gpt", "value": "a {}", "weight": 1.0},
        ]
    },
}


def filled(record: object, number: object) -> object:
    return json.loads(json.dumps(record).replace("{}", str(number)))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put records where a name looks for them: the hub's cache, or a stand-in for ``datasets``.

    Returns the ids that were streamed, in the order of their first record.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    opened, tables = [], {}

    def load(identifier, *, split, streaming):
        assert (split, streaming) == ("train", True)
        opened.append(identifier)
        return iter(tables[identifier])

    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)

    def put(name, records):
        row = catalog.HUB_SETS[name]
        tables[row.hub] = records
        if row.file:
            folder = tmp_path / f"datasets--{row.hub.replace('/', '--')}"
            snapshot = folder / "snapshots" / "0" / row.file
            snapshot.parent.mkdir(parents=True)
            snapshot.write_text(json.dumps(records))
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text("0")
        return opened

    return put


@pytest.mark.parametrize("name", catalog.HUB_SETS)
def test_every_name_reads_its_format(hub, name):
    row = catalog.HUB_SETS[name]
    opened = hub(name, [filled(MADE_UP[name], number) for number in range(3)])
    assert set(row.keys) <= set(MADE_UP[name])
    read = read_conversations(name)
    assert read == [
        Conversation(tuple(Message(m.role, m.content.format(n)) for m in ONE_TURN))
        for n in range(3)
    ]
    assert opened == ([] if row.file else [row.hub])


@pytest.mark.parametrize("name", ["alpaca", "metamathqa"])
def test_an_error_names_the_set_and_the_record(hub, name):
    row = catalog.HUB_SETS[name]
    hub(name, [filled(MADE_UP[name], 0), {row.keys[0]: 7, row.keys[-1]: "a"}])
    with pytest.raises(DataError) as fault:
        read_conversations(name)
    place = f"{row.hub}/{row.file}:1: " if row.file else f"{row.hub} row 2: "
    assert fault.value.message == f"{place}'{row.keys[0]}' must be text, not a number."


def test_a_mixture_draws_from_all_its_parts_by_seed(hub):
    for name in catalog.MIXTURES["llama-pro"].copies:
        hub(name, [filled(MADE_UP[name], f"{name} {number}") for number in range(60)])
    records = list(itertools.islice(read_records("llama-pro", "train", False, seed=3), 100))
    counted = Counter(re.split(r" row |\.json:|/[^/]*\.json:", where)[0] for where, _ in records)
    hubs = {catalog.HUB_SETS[name].hub for name in catalog.MIXTURES["llama-pro"].copies}
    assert set(counted) == hubs
    assert counted["Open-Orca/SlimOrca"] > counted["theblackcat102/evol-codealpaca-v1"]

    def read(seed):
        return read_conversations("llama-pro", max_samples=100, seed=seed)

    assert read(3) == read(3) != read(4)
    assert len(read_conversations("llama-pro")) == 5 * 60
    assert len(set(read_conversations("llama-pro"))) == 5 * 60


def test_shares_of_llama_pro():
    parts = catalog.parts_of("llama-pro")
    total = sum(weight for _, weight in parts)
    shares = [round(100 * weight / total, 1) for _, weight in parts]
    assert shares == [13.7, 10.6, 38.3, 29.2, 8.2]
    assert all(f"{share} %" in DOCUMENT for share in shares)


# -- drawing ----------------------------------------------------------------------------------


def test_interleave_respects_weights_and_seed():
    weights = {"a": 5.0, "b": 3.0, "c": 2.0}

    def draw(seed, scale=1.0):
        parts = [(itertools.repeat(key), scale * weight) for key, weight in weights.items()]
        return list(itertools.islice(catalog.interleave(parts, seed), 5000))

    counted = Counter(draw(0))
    # Three standard deviations of 5000 draws are at most 2.2 %.
    assert all(abs(counted[key] / 5000 - weight / 10) < 0.022 for key, weight in weights.items())
    assert draw(0) == draw(0) == draw(0, scale=4.0) != draw(1)


def test_interleave_gives_everything_once_and_in_each_parts_order():
    parts = [(iter([("a", n) for n in range(size)]), weight) for size, weight in ((5, 9), (50, 1))]
    drawn = list(catalog.interleave(parts, 0))
    assert sorted(drawn) == sorted([("a", n) for n in range(5)] + [("a", n) for n in range(50)])
    assert list(catalog.interleave([(iter(range(9)), 0.5)], 7)) == list(range(9))
    assert list(catalog.interleave([], 0)) == []


def counting(limit):
    """0, 1, 2 ..., and an error for whoever reads past ``limit`` items."""
    yield from range(limit)
    raise AssertionError("read past what was needed")


def test_interleave_reads_nothing_ahead():
    parts = [(counting(0), 1e-12), (counting(6), 1.0)]
    assert list(itertools.islice(catalog.interleave(parts, 0), 6)) == list(range(6))


@pytest.mark.parametrize("buffer", [1, 2, 10, 40])
def test_shuffle_reads_one_buffer_ahead(buffer):
    drawn = list(itertools.islice(catalog.shuffled(counting(20 + buffer - 1), buffer, 0), 20))
    assert all(item < place + buffer for place, item in enumerate(drawn))
    assert len(set(drawn)) == 20
    assert (drawn == list(range(20))) == (buffer == 1)


def test_shuffle_is_a_permutation_by_seed():
    def order(buffer, seed):
        return list(catalog.shuffled(iter(range(30)), buffer, seed))

    for buffer in (1, 7, 30, 31, 1000):
        assert sorted(order(buffer, 0)) == list(range(30))
    assert order(7, 0) == order(7, 0) != order(7, 1)
    # A full shuffle brings the last item to any place.
    assert len({order(30, seed).index(29) for seed in range(300)}) == 30
    with pytest.raises(ValueError, match="at least 1"):
        catalog.shuffled(iter(()), 0, 0)


# -- names ------------------------------------------------------------------------------------


def test_a_file_of_that_name_is_not_hidden(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub("alpaca", [filled(MADE_UP["alpaca"], 0)])
    (tmp_path / "alpaca").mkdir()
    assert len(read_conversations("alpaca")) == 1
    (tmp_path / "alpaca").rmdir()
    (tmp_path / "alpaca").write_text("my own")
    with pytest.raises(DataError, match="a file here has this name") as fault:
        read_conversations("alpaca")
    assert "Rename the file" in fault.value.remedy
    assert not [name for name in catalog.names() if Path(name).suffix]


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "llama-pro"])
def test_a_split_that_is_not_there(name):
    with pytest.raises(DataError, match="has no split 'test'") as fault:
        read_conversations(name, split="test")
    assert "data.split to train" in fault.value.remedy


def test_an_unknown_name_is_told_the_known_ones(hub):
    hub("alpaca", [])
    with pytest.raises(DataError, match="cannot load the data set 'alpacca'") as fault:
        read_conversations("alpacca")
    assert all(name in fault.value.remedy for name in catalog.names())


def test_without_a_network_every_name_is_one_clear_error(tmp_path):
    code = """
from mskip.compressor import catalog
from mskip.compressor.data import read_conversations
from mskip.compressor.errors import DataError
for name in catalog.names():
    try:
        read_conversations(name, max_samples=1)
    except DataError as error:
        hubs = [row.hub for row, _ in catalog.parts_of(name)]
        assert any(hub in error.message for hub in hubs), error.message
        assert "network" in error.remedy
        print(name)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **offline},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == catalog.names()


# -- the documentation ------------------------------------------------------------------------


def test_the_page_has_every_row():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", DOCUMENT, re.MULTILINE))
    assert list(rows) == catalog.names()
    for name, row in catalog.HUB_SETS.items():
        cells = [row.hub, row.file or "", f"{row.rows:,}", row.licence.split(" by its")[0]]
        assert all(cell in rows[name] for cell in [*cells, *row.keys]), name


EXAMPLES = re.findall(r"```json\n(.*)\n```\n```text\n((?:.*\n)*?)```", DOCUMENT)


def test_the_page_has_an_example_of_every_format():
    records = [json.loads(record) for record, _ in EXAMPLES]
    for row in catalog.HUB_SETS.values():
        assert any(set(row.keys) <= set(record) for record in records), row.keys


@pytest.mark.parametrize(("record", "expected"), EXAMPLES)
def test_the_examples_of_the_page(tmp_path, record, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(record)
    said = []
    for line in expected.splitlines():
        role, _, text = line.partition(": ")
        said.append((role, text.replace("\\n", "\n")))
    (read,) = read_conversations(str(path))
    if said[0][0] == "prompt":
        assert read == Conversation(prompt=said[0][1], text=said[1][1])
        return
    turns = [Message("assistant" if role == "answer" else role, text) for role, text in said]
    assert read == Conversation(tuple(turns))
    assert read.answered == ("\nanswer: " in expected)
