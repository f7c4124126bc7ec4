"""Files are written whole or not at all, whatever goes wrong and whenever it does."""

import errno
import json
import os
from pathlib import Path

import pytest

from mskip.compressor.errors import ArtifactError, MskipError
from mskip.compressor.files import (
    read_json,
    sha256,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest keeps for itself."""


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- one file ---------------------------------------------------------------------------------


def test_whole_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # or the replacement could not be one step
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, Stop, OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException] | OSError, existed: bool
) -> None:
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    expected = ArtifactError if isinstance(error, OSError) else error

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(expected):
        fail()
    assert names(tmp_path) == (["a.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_full_disk_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ArtifactError, match=rf"cannot write {path}: No space left") as e:
        write_text(path, "new")
    assert "free space" in e.value.remedy
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_bytes_are_on_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    synced: list[bool] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(path.exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_text(path, "new")
    assert synced == [False]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(ArtifactError, match="cannot write") as e:
            write_text(path, "new")
        assert str(path) in e.value.message
        assert isinstance(e.value, MskipError)
    with pytest.raises(ArtifactError, match="cannot write"), whole_folder(tmp_path / "file" / "b"):
        pass
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


# -- one folder -------------------------------------------------------------------------------


def test_whole_folder_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    for content in ("first", "second"):
        with whole_folder(path) as temporary:
            (temporary / f"{content}.txt").write_text(content)
            assert not (path / f"{content}.txt").exists()
        assert names(path) == [f"{content}.txt"]
        assert names(path.parent) == ["run"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, Stop, OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_in_the_block_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException] | OSError, existed: bool
) -> None:
    path = tmp_path / "run"
    if existed:
        write_text(path / "old.txt", "old")
    expected = ArtifactError if isinstance(error, OSError) else error

    def fail() -> None:
        with whole_folder(path) as temporary:
            (temporary / "half.txt").write_text("half")
            raise error

    with pytest.raises(expected):
        fail()
    assert names(tmp_path) == (["run"] if existed else [])
    assert not existed or names(path) == ["old.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    path = tmp_path / "run"
    if existed:
        write_text(path / "old.txt", "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if (self / "new.txt").exists():
            full_disk()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ArtifactError, match="No space left"), whole_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(tmp_path) == (["run"] if existed else [])
    assert not existed or names(path) == ["old.txt"]


# -- JSON and hashes --------------------------------------------------------------------------


def test_json_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"tau": [0.1, 1e-30], "name": "größer ≥", "none": None}
    write_json(path, value)
    assert read_json(path, "calibration") == value
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {"a": object()}])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["a.json"]


def test_missing_json_names_what_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as e:
        read_json(tmp_path / "a.json", "calibration", "Run: mskip calibrate")
    assert e.value.message == f"no calibration at {tmp_path / 'a.json'}."
    assert e.value.remedy == "Run: mskip calibrate"
    assert str(e.value) == f"{e.value.message}\n{e.value.remedy}"


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}}', b"\xff\xfe{}"])
def test_damaged_json_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is not valid JSON") as e:
        read_json(path, "calibration")
    assert str(path) in e.value.message
    assert e.value.remedy


def test_json_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path, "calibration")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path / "file" / "a.json", "calibration")


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"x" * ((1 << 22) + 1))  # more than one block
    whole = sha256(path)
    path.write_bytes(b"x" * (1 << 22))
    assert sha256(path) != whole
