"""Records of every source, and the fault of a source named with its line."""

import json
import sys
import types
from pathlib import Path

import pytest

from mskip.compressor.errors import DataError
from mskip.compressor.records import read_records


def records(source: object, *, split: str = "train", trust: bool = False, **order: int) -> list:
    return list(read_records(str(source), split, trust, **order))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_json_lines_count_blank_lines_and_survive_line_separators(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\r\n\r\n{"text": "c"}')
    assert records(path) == [(f"{path}:1", {"text": "a\u2028b"}), (f"{path}:3", {"text": "c"})]


def test_json_list_yields_the_line_each_record_begins_at(tmp_path):
    rows = [{"text": "a\nb"}, {"n": [1, {"x": "]"}]}, 3]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=2))
    assert [record for _, record in records(path)] == rows
    assert [where for where, _ in records(path)] == [f"{path}:{line}" for line in (2, 5, 13)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_json_list_is_the_same_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("mskip.compressor.records._CHUNK", chunk)
    rows = [
        12345,
        {"text": 'é\u2028 "]" \\', "n": [-1.5e-3, None, True]},
        {},
        [],
        "\U0001f600",
        678,
    ]
    path = tmp_path / "a.json"
    for indent, ascii_only in ((None, True), (2, False)):
        write(path, json.dumps(rows, indent=indent, ensure_ascii=ascii_only))
        assert [record for _, record in records(path)] == rows
    assert [where for where, _ in records(path)] == [f"{path}:{n}" for n in (2, 3, 11, 12, 13, 14)]
    write(path, '[\n{"text": "a"},\n{"text" "b"}]')
    with pytest.raises(DataError, match=r"a\.json:3: malformed JSON: Expecting ':'"):
        records(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_a_file_is_read_no_further_than_asked(tmp_path, name):
    """What cannot be decoded lies beyond the chunks that two records need."""
    rows = [json.dumps({"text": f"{number} {'x' * 1000}"}).encode() for number in range(200)]
    separator = {"a.json": b",\n", "a.jsonl": b"\n", "a.txt": b"\n\n"}[name]
    opening = b"[" if name == "a.json" else b""
    (tmp_path / name).write_bytes(opening + separator.join([*rows, b"\xff"]))
    read = read_records(str(tmp_path / name), "train", False)
    first, second = next(read)[1], next(read)[1]
    assert "0 xxx" in first["text"]
    assert "1 xxx" in second["text"]
    with pytest.raises(DataError, match="not UTF-8"):
        list(read)


def test_shuffled_records_keep_their_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(1, 51)))
    order = {"shuffle_buffer": 50, "seed": 1}
    read = records(path, **order)
    assert read != records(path)
    assert sorted(read, key=lambda item: item[1]["n"]) == records(path)
    assert all(where == f"{path}:{record['n']}" for where, record in read)
    assert read == records(path, **order) != records(path, shuffle_buffer=50, seed=2)
    with pytest.raises(ValueError, match="at least 1"):
        records(path, shuffle_buffer=-1)


def test_documents_are_separated_by_blank_lines(tmp_path):
    path = write(tmp_path / "a.txt", "\n one\ntwo\n \n\nthree\n")
    assert records(path) == [
        (f"{path}:2", {"text": " one\ntwo"}),
        (f"{path}:6", {"text": "three"}),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "A.JSON"])
def test_blank_file_has_no_records_and_a_byte_order_mark_is_no_text(tmp_path, name):
    assert records(write(tmp_path / name, "\ufeff \n\n")) == []


@pytest.mark.parametrize(
    ("name", "text", "line", "reason"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', 3, "Expecting value"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}', 1, "Extra data"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", 1, "4300 digits"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', 3, "Expecting ':'"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}]', 3, "expecting ',' or ']'"),
        ("a.json", '[{"text": "a"},\n]', 2, "Expecting value"),
        ("a.json", '[\n{"text": "a"}\n', 3, "expecting ',' or ']'"),
        ("a.json", '[\n{"text": "a"},\n', 3, "Expecting value"),
        ("a.json", '[{"text": "a"}]\n\nrest', 3, "something follows the list"),
        ("a.json", '\n{"text": "a"}', 2, "does not begin with '['"),
        ("a.json", "[\n" + "[" * 100_000, 2, "recursion"),
    ],
)
def test_malformed_json_is_named_with_its_line(tmp_path, name, text, line, reason):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as fault:
        records(path)
    assert fault.value.message.startswith(f"{path}:{line}: malformed JSON")
    assert reason in fault.value.message
    assert fault.value.remedy


@pytest.mark.parametrize("name", ["no.json", "no.jsonl", "no.txt", "no/such/file.json"])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match="no data file at"):
        records(tmp_path / name)


def test_folder_and_other_encodings(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*folder\.json"):
        records(tmp_path / "folder.json")
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        records(tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["data/", "./a", "/tmp/a.csv", "a b", "", "hub/id/extra"])
def test_neither_file_nor_hub_id(source):
    with pytest.raises(DataError, match="neither a data file nor a hub data set id") as fault:
        records(source)
    assert ".jsonl" in fault.value.remedy


def test_existing_file_of_another_kind_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", "text")
    with pytest.raises(DataError, match="neither"):
        records("a.csv")


def test_unknown_embedded_name():
    with pytest.raises(DataError, match="no embedded data 'embedded:other'"):
        records("embedded:other")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets``; returns the calls it got."""
    calls = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def install(load):
        module = types.ModuleType("datasets")
        module.load_dataset = load
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    install.calls = calls
    return install


def test_hub_rows(hub):
    calls = hub(lambda name, **options: calls.append((name, options)) or iter([{"text": "a"}]))
    assert records("some/set", split="test", trust=True) == [("some/set row 1", {"text": "a"})]
    # This loader does not know the word, so it is not passed even when asked for.
    assert calls == [("some/set", {"split": "test", "streaming": True})]


def test_offline_the_prepared_copy_is_asked_for(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    calls = hub(lambda name, split, streaming: calls.append(streaming) or [])
    assert records("some/set") == []
    assert calls == [False]


def test_hub_rows_are_read_no_further_than_asked(hub):
    def load(name, split, streaming):
        yield {"text": "a"}
        raise AssertionError("read past what was needed")

    hub(load)
    assert next(read_records("some/set", "train", False)) == ("some/set row 1", {"text": "a"})


def test_datasets_itself_streams(tmp_path, monkeypatch):
    """The real library, on a folder in place of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    turns = [{"from": "human", "value": "q", "weight": 0.0}, {"from": "gpt", "value": "a"}]
    (tmp_path / "some" / "set").mkdir(parents=True)
    rows = [json.dumps({"conversations": turns, "key": number}) for number in range(3)]
    write(tmp_path / "some" / "set" / "train.jsonl", "\n".join(rows))
    read = records("some/set")
    assert [where for where, _ in read] == [f"some/set row {number}" for number in (1, 2, 3)]
    assert [record["key"] for _, record in read] == [0, 1, 2]
    assert [turn["value"] for turn in read[2][1]["conversations"]] == ["q", "a"]
    with pytest.raises(DataError, match=r"cannot load .* \(split 'test'\): .*split"):
        records("some/set", split="test")


def test_a_json_list_of_the_hub_is_opened_by_itself(tmp_path, monkeypatch):
    """fsspec's file system in memory in place of the hub's."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: memory)
    name = "meta-math/MetaMathQA/MetaMathQA-395K.json"
    rows = [{"query": str(number), "response": "é" * 1000} for number in range(200)]
    text = json.dumps(rows, ensure_ascii=False, indent=0).encode()
    memory.pipe(f"datasets/{name}", text[:-1] + b"\xff")
    try:
        read = read_records("metamathqa", "train", False)
        assert next(read) == (f"{name}:2", rows[0])
        with pytest.raises(DataError, match=rf"cannot load the data set '{name}': .*utf-8"):
            list(read)
    finally:
        memory.rm(f"datasets/{name}")
    with pytest.raises(DataError, match=rf"cannot load the data set '{name}'"):
        records("metamathqa")


@pytest.mark.parametrize(("trust", "passed"), [(True, [True]), (False, [None])])
def test_remote_code_only_when_asked_for_and_supported(hub, trust, passed):
    calls = hub.calls

    def load(name, split, streaming, trust_remote_code=None):
        calls.append(trust_remote_code)
        return []

    hub(load)
    assert records("set", trust=trust) == []
    assert calls == passed


def test_any_hub_failure_names_id_cause_and_remedy(hub):
    def load(name, split, streaming):
        raise ConnectionError("no route to host\nlong trace")

    hub(load)
    with pytest.raises(DataError) as fault:
        records("some/set", split="test")
    assert fault.value.message == (
        "cannot load the data set 'some/set' (split 'test'): no route to host"
    )
    assert "network" in fault.value.remedy


def test_hub_failure_while_rows_are_read(hub):
    def load(name, split, streaming):
        yield {"text": "a"}
        raise OSError

    hub(load)
    with pytest.raises(DataError, match=r"cannot load the data set 'set'.*OSError"):
        records("set")
