"""A folder or an object store: files are there whole or not at all, and errors say what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from headrace.gpu import snapshot_place
from headrace.gpu.errors import ConfigError, SnapshotError
from headrace.gpu.snapshot_place import AlreadyThere, Place


@pytest.fixture(params=["folder", "file", "memory", "root"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "root":
        shutil.rmtree(tmp_path)
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        return Place("memory://")
    urls = {"folder": f"{tmp_path}/a/b/", "file": f"file://{tmp_path}/a/b", "memory": f"memory://{uuid.uuid4().hex}/b"}
    return Place(urls[request.param])


def folder_in(place: Place, path: str, **files: str) -> None:
    with place.new(path, last="z") as made:
        made.mkdir()
        (made / "deep").mkdir()
        for name, content in files.items():
            (made / name.replace("_", "/")).write_text(content)


def test_files(place: Place) -> None:
    assert place.read("snapshots/one.json") is None
    assert place.names("snapshots") == []
    place.write("snapshots/one.json", b"1")
    place.write("snapshots/two.json", b"22")
    place.write("snapshots/one.json", b"333")
    assert place.read("snapshots/one.json") == b"333"
    assert place.names("snapshots") == ["one.json", "two.json"]
    assert place.names("") == ["snapshots"]
    assert place.sizes("snapshots") == {"one.json": 3, "two.json": 2}
    with place.copy("snapshots/one.json") as file:
        assert file.read_bytes() == b"333"
    place.remove("snapshots/one.json")
    place.remove("snapshots/one.json")
    assert (place.read("snapshots/one.json"), place.names("snapshots")) == (None, ["two.json"])


def test_folders(place: Place) -> None:
    folder_in(place, "segments/x", z="last", a="first", deep_b="second")
    assert place.sizes("segments/x") == {"a": 5, "deep/b": 6, "z": 4}
    assert place.sizes("") == {"segments/x/a": 5, "segments/x/deep/b": 6, "segments/x/z": 4}
    assert (place.names("segments"), place.names("segments/x")) == (["x"], ["a", "deep", "z"])
    with place.copy("segments/x", ["a", "deep/b", "missing"]) as folder:
        assert [(folder / name).read_text() for name in ("a", "deep/b")] == ["first", "second"]
        assert not (folder / "missing").exists()
    with place.copy("segments/none", ["a"]) as folder:
        assert not (folder / "a").exists()
    place.remove("segments/x")
    place.remove("segments/x")
    assert (place.sizes("segments"), place.names("segments")) == ({}, [])


def half(file: Path, error: BaseException) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"half")
    raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_block_that_fails_leaves_nothing(place: Place, error: BaseException) -> None:
    place.write("moments/one", b"1")
    expected = SnapshotError if isinstance(error, OSError) else type(error)
    for path in ("moments/one", "moments/two"):
        with pytest.raises(expected), place.new(path) as file:
            half(file, error)
        with pytest.raises(expected), place.new(path.replace("moments", "segments")) as folder:
            half(folder / "index", error)
    assert place.sizes("") == {"moments/one": 1}
    assert place.read("moments/one") == b"1"
    assert place.unfinished("moments") == place.unfinished("segments") == []


def test_a_folder_is_not_replaced_and_a_file_is(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    folder_in(place, "segments/x", z="1")
    with pytest.raises(AlreadyThere, match="holds something already"):
        folder_in(place, "segments/x", z="2")
    assert (tmp_path / "segments" / "x" / "z").read_text() == "1"
    assert os.listdir(tmp_path / "segments") == ["x"]


def test_of_two_that_make_the_same_folder_one_is_told(tmp_path: Path) -> None:
    together, told = threading.Barrier(2), []

    def make() -> None:
        try:
            with Place(str(tmp_path)).new("segments/x") as made:
                made.mkdir()
                (made / "index").write_text("whole")
                together.wait(30)
        except AlreadyThere as error:
            told.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1
    assert Place(str(tmp_path)).sizes("") == {"segments/x/index": 5}


def test_what_is_synced_is_renamed_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = os.replace
    monkeypatch.setattr(snapshot_place, "_sync", lambda path: seen.append(path.name.split(".")[0]))
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append("rename"), real(old, new)))
    folder_in(Place(str(tmp_path)), "segments/x", z="1", deep_b="2")
    assert sorted(seen[:4]) == ["b", "deep", "x", "z"]
    assert seen[4:] == ["rename", "segments"]


def test_the_file_that_completes_a_folder_is_uploaded_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, local, remote, **_: seen.append(remote))
    place = Place("memory://bucket")
    with place.new("segments/x", last="manifest.json") as made:
        made.mkdir()
        for name in ("zebra", "manifest.json", "index"):
            (made / name).write_text("")
    assert [Path(path).name for path in seen] == ["index", "zebra", "manifest.json"]


def test_downloads_and_uploads_leave_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = Place(f"memory://{uuid.uuid4().hex}")
    place.write("one", b"1")
    with place.copy("one") as file:
        assert file.is_relative_to(tmp_path)
    assert os.listdir(tmp_path) == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_urls_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        Place("")
    with pytest.raises(SnapshotError, match=r"^nope://bucket cannot be used: check the URL"):
        Place("nope://bucket")
    with pytest.raises(SnapshotError, match=r"memory://x cannot be used"):
        Place("memory://x", {"self": 1})


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(snapshot_place, "url_to_fs", missing)
    with pytest.raises(SnapshotError, match=r"s3://bucket/docs needs a package .*Install s3fs.*on every worker"):
        Place("s3://bucket/docs")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/docs/", "s3://bucket/docs"),
        ("abfs://container@account/docs?sig=secret", "abfs://container@account/docs"),
        ("memory://docs", "memory://docs"),
        ("a/b:c@d", "a/b:c@d"),
    ],
)
def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch, url: str, shown: str) -> None:
    fs = MemoryFileSystem()
    monkeypatch.setattr(snapshot_place, "url_to_fs", lambda url, **options: (fs, "bucket"))
    place = Place(url, {"key": "secret"})
    assert place.url == shown
    assert "secret" not in repr(place) + place.shown("x") + str(vars(place).keys())


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EACCES, "give this user the right to write it"),
        (errno.EROFS, "take a place that can be written"),
        (errno.EIO, "check that it can be reached"),
    ],
)
def test_errors_name_place_and_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str) -> None:
    def broken(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(snapshot_place, "_sync", broken)
    with pytest.raises(SnapshotError, match=f"cannot write {tmp_path}/snapshots/one.json: .*{cure}"):
        Place(str(tmp_path)).write("snapshots/one.json", b"{}")
    assert os.listdir(tmp_path / "snapshots") == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "docs").write_text("a file")
    place = Place(str(tmp_path / "docs"))
    with pytest.raises(SnapshotError, match="cannot write"):
        place.write("snapshots/one.json", b"{}")
    assert (place.read("snapshots/one.json"), place.names("snapshots"), place.sizes("snapshots")) == (None, [], {})


class StoreError(Exception):
    """As the packages of object stores have them: no OSError."""


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("cat_file", lambda place: place.read("x")),
        ("put_file", lambda place: place.write("x", b"")),
        ("find", lambda place: place.sizes("x")),
        ("ls", lambda place: place.names("x")),
        ("rm", lambda place: place.remove("x")),
        ("get_file", lambda place: place.copy("x").__enter__()),
    ],
)
def test_whatever_an_object_store_raises_is_told(monkeypatch: pytest.MonkeyPatch, method: str, call: Any) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise StoreError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, method, broken)
    with pytest.raises(SnapshotError, match=r"memory://docs/x: check .* \(StoreError: no credentials\)"):
        call(Place("memory://docs"))
