"""Records of every source, and the fault of a source named with its line."""

import json
import sys
import types
from pathlib import Path

import pytest

from mskip.compressor.errors import DataError
from mskip.compressor.records import read_records


def records(source: object, *, split: str = "train", trust: bool = False) -> list:
    return list(read_records(str(source), split, trust))


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
    assert calls == [("some/set", {"split": "test"})]


@pytest.mark.parametrize(("trust", "passed"), [(True, [True]), (False, [None])])
def test_remote_code_only_when_asked_for_and_supported(hub, trust, passed):
    calls = hub.calls
    hub(lambda name, split, trust_remote_code=None: calls.append(trust_remote_code) or [])
    assert records("set", trust=trust) == []
    assert calls == passed


def test_any_hub_failure_names_id_cause_and_remedy(hub):
    def load(name, split):
        raise ConnectionError("no route to host\nlong trace")

    hub(load)
    with pytest.raises(DataError) as fault:
        records("some/set", split="test")
    assert fault.value.message == (
        "cannot load the data set 'some/set' (split 'test'): no route to host"
    )
    assert "network" in fault.value.remedy


def test_hub_failure_while_rows_are_read(hub):
    def load(name, split):
        yield {"text": "a"}
        raise OSError

    hub(load)
    with pytest.raises(DataError, match=r"cannot load the data set 'set'.*OSError"):
        records("set")
