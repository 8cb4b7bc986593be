"""Where snapshots are kept: a folder, or an object store that fsspec reaches."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from headrace.gpu.errors import ConfigError, HeadraceError, SnapshotError

__all__ = ["AlreadyThere", "Place"]

log = logging.getLogger("headrace.gpu")

_UNFINISHED = ".part"
_CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there or raise the quota",
    errno.EACCES: "give this user the right to",
    errno.EPERM: "give this user the right to",
    errno.EROFS: "take a place that can be written",
    errno.ENOENT: "make the folder or bucket first",
}


class AlreadyThere(SnapshotError):
    """A folder of that name holds something: somebody else has just made it."""


class Place:
    """A folder of files that appear whole or not at all.

    Parameters
    ----------
    url : str
        A folder's path, or whatever fsspec understands: ``file:///…``, ``s3://bucket/…``, ``memory://…``.
    options : mapping, optional
        fsspec's storage options (keys, endpoints). Never shown nor logged.

    Attributes
    ----------
    url : str
        As given, without password and query.

    Raises
    ------
    ConfigError
        The URL is empty.
    SnapshotError
        The URL's kind is unknown, the package for it is not installed, or its options cannot be.

    Notes
    -----
    All calls block and may be made from any thread but an event loop's. Paths are relative, with "/" between names.
    Every call raises `SnapshotError` where the place cannot be reached, written or read; the message names URL and
    cure. Making a `Place` touches no file.

    A folder is read and written in place: what is new is made beside its name, synced to the disk, and renamed. With
    other file systems files come and go by way of a temporary folder, whole.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        if not url:
            raise ConfigError("the URL of the snapshots is empty: give a folder, or a URL such as s3://bucket/folder")
        self.url = re.sub(r"://[^/@:]*:[^/@]*@", "://", url).split("?")[0].rstrip("/")
        try:
            self._fs, root = url_to_fs(url, **dict(options or {}))
        except ImportError as error:
            raise SnapshotError(
                f"{self.url} needs a package that is not installed here: {error}; pip install it on every worker"
            ) from error
        except Exception as error:  # of whatever package this URL's kind belongs to
            raise SnapshotError(f"{self.url} cannot be used: check the URL and its options ({error})") from error
        self._root = str(root).rstrip("/")
        self._local = Path(self._root or "/") if isinstance(self._fs, LocalFileSystem) else None

    def __repr__(self) -> str:
        return f"Place({self.url!r})"

    def shown(self, path: str) -> str:
        """A path as messages name it."""
        return f"{self.url}/{path}"

    # -- small files and lists -----------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """A small file whole; None where there is none."""
        with self._telling("read", path, remote=not self._local), suppress(FileNotFoundError, NotADirectoryError):
            content: bytes = self._local_path(path).read_bytes() if self._local else self._fs.cat_file(self._at(path))
            return content
        return None

    def write(self, path: str, content: bytes) -> None:
        """Make or replace a small file in one rename (folder) or one put (object store)."""
        with self.new(path) as file:
            file.write_bytes(content)

    def sizes(self, path: str) -> dict[str, int]:
        """Bytes of all files below a folder by their paths within it; empty where there is none."""
        with self._telling("list", path, remote=not self._local):
            if self._local:
                folder = self._local_path(path)
                sizes: dict[str, int] = {}
                for file in folder.rglob("*"):
                    with suppress(FileNotFoundError):  # another has just renamed or removed it
                        if file.is_file():
                            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
                return sizes
            self._fs.invalidate_cache()  # other workers write here, too
            with suppress(FileNotFoundError):
                found = self._fs.find(self._at(path), detail=True)
                start = len(self._stripped(path)) + 1
                return {name[start:]: int(info["size"]) for name, info in found.items() if name[start:]}
        return {}

    def names(self, path: str) -> list[str]:
        """Names of the files and folders in a folder, sorted; not of what is being written."""
        return [name for name in self._all_names(path) if not name.endswith(_UNFINISHED)]

    def unfinished(self, path: str) -> list[str]:
        """Names of what is being written in a folder, or was when its writer ended."""
        return [name for name in self._all_names(path) if name.endswith(_UNFINISHED)]

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
        with self._telling("remove", path, remote=not self._local), suppress(FileNotFoundError):
            if not self._local:
                self._fs.invalidate_cache()
                self._fs.rm(self._at(path), recursive=True)
            elif (local := self._local_path(path)).is_dir():
                shutil.rmtree(local)
            else:
                local.unlink()

    # -- files of any size ---------------------------------------------------------------------------------------------

    @contextmanager
    def new(self, path: str, last: str = "") -> Iterator[Path]:
        """A local path at which the block makes a file or a folder; it is at `path` of the place after the block.

        Where the block fails, or this does, there is nothing.

        Parameters
        ----------
        path : str
            A file that is there is replaced, a folder is not.
        last : str, optional
            Of a folder the file that makes it complete: uploaded when all others are.

        Raises
        ------
        AlreadyThere
            There is a folder of that name that holds something. Not told by object stores: there both writers' files
            end up in one folder.
        """
        with self._telling("write", path):
            if self._local:
                target = self._local_path(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                made = target.with_name(f"{target.name}.{uuid.uuid4().hex}{_UNFINISHED}")
                try:
                    yield made
                    _rename(made, target)
                finally:
                    _discard(made)
                return
            with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
                made = Path(folder) / "new"
                yield made
                with self._telling("write", path, remote=True):
                    self._upload(made, path, last)

    @contextmanager
    def copy(self, path: str, names: Collection[str] = ()) -> Iterator[Path]:
        """A local path at which a file can be read during the block, or the files `names` of a folder.

        The file itself, or a download; what is missing is missing there.
        """
        if self._local:
            with self._telling("read", path):
                yield self._local_path(path)
            return
        with self._telling("read", path), tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            target = Path(folder) / "copy"
            with self._telling("read", path, remote=True):
                for name in names or ("",):
                    file = target / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileNotFoundError):
                        self._fs.get_file(self._at(path, name), str(file))
            yield target

    # -- inside --------------------------------------------------------------------------------------------------------

    def _upload(self, made: Path, path: str, last: str) -> None:
        files = [""]
        if made.is_dir():
            files = [file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()]
        try:
            for name in sorted(files, key=lambda name: (name == last, name)):
                self._fs.put_file(str(made / name), self._at(path, name))
        except BaseException:
            # Some file systems keep what had arrived of a file.
            with suppress(SnapshotError):
                self.remove(path)
            raise

    def _all_names(self, path: str) -> list[str]:
        with self._telling("list", path, remote=not self._local), suppress(FileNotFoundError, NotADirectoryError):
            if self._local:
                return sorted(os.listdir(self._local_path(path)))
            self._fs.invalidate_cache()
            listed = [name.rstrip("/") for name in self._fs.ls(self._at(path), detail=False)]
            return sorted(PurePosixPath(name).name for name in listed if name != self._stripped(path))
        return []

    def _local_path(self, path: str) -> Path:
        assert self._local is not None
        return self._local / path

    def _at(self, path: str, name: str = "") -> str:
        return "/".join(part for part in (self._root, path, name) if part)

    def _stripped(self, path: str) -> str:
        """As the file system names it in its answers."""
        return str(self._fs._strip_protocol(self._at(path))).rstrip("/")

    @contextmanager
    def _telling(self, doing: str, path: str, *, remote: bool = False) -> Iterator[None]:
        """An `OSError`, and whatever an object store's package raises, as a `SnapshotError` with the cure."""
        try:
            yield
        except HeadraceError:
            raise
        except OSError as error:
            cure = _CURES.get(error.errno or 0, "check that it can be reached")
            cure = f"{cure} {doing} it" if cure.endswith("right to") else cure
            raise SnapshotError(f"cannot {doing} {self.shown(path)}: {cure} ({error})") from error
        except Exception as error:
            if not remote:
                raise
            # Object stores' packages have errors of their own, with no root in common.
            told = f"cannot {doing} {self.shown(path)}: check that it can be reached, and the rights to it"
            raise SnapshotError(f"{told} ({type(error).__name__}: {error})") from error


def _rename(made: Path, target: Path) -> None:
    for file in [*made.rglob("*"), made]:
        _sync(file)
    try:
        os.replace(made, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise AlreadyThere(f"{target} holds something already: remove it first ({error})") from error
        raise
    _sync(target.parent)


def _discard(made: Path) -> None:
    if made.is_dir():
        shutil.rmtree(made, ignore_errors=True)
    with suppress(OSError):
        made.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
