"""Row 25: with TLS on, nobody without one of the cluster's certificates gets a word in."""

from __future__ import annotations

import pickle
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import distributed  # noqa: F401 (its defaults are part of the configuration)
import numpy as np
import pytest
import yaml

import headrace
from headrace.gpu.errors import ClusterError
from headrace.streams.broker import EmbeddedBroker

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "certificates.sh"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


def certificates(folder: Path) -> dict[str, Any]:
    """Dask's settings for a new set of certificates, as a user makes them."""
    subprocess.run(["bash", str(SCRIPT), str(folder)], check=True, capture_output=True, timeout=60)
    settings = yaml.safe_load((folder / "dask-tls.yaml").read_text())
    # Dask merges files, but `set` replaces a whole section that it is given.
    return {"distributed.comm": dask.config.merge(dask.config.get("distributed.comm"), settings["distributed"]["comm"])}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cluster's certificates, and a stranger's."""
    folder = tmp_path_factory.mktemp("certificates")
    return certificates(folder / "ours"), certificates(folder / "theirs")


@pytest.fixture(scope="module")
def secured(sets: tuple[dict[str, Any], dict[str, Any]]) -> Iterator[headrace.Database]:
    with dask.config.set(sets[0]), headrace.connect(workers=2, processes=True, backend="host") as db:
        yield db


def test_everything_works_over_tls(
    secured: headrace.Database, sets: tuple[dict[str, Any], dict[str, Any]], broker: EmbeddedBroker, topic: str
) -> None:
    assert secured.address.startswith("tls://")
    assert all(worker.startswith("tls://") for worker in secured.workers)
    with dask.config.set(sets[0]), headrace.connect(secured.address) as other:
        docs = other.create_collection(topic, dim=2)
        docs.ingest(broker.bootstrap, topic)
        docs.upsert({"id": "a", "vector": [1, 2]}, wait="searchable")
        assert [hit.id for hit in docs.search(np.array([1, 2]))] == ["a"]
        other.drop_collection(topic)


def test_a_plaintext_client_is_refused(secured: headrace.Database) -> None:
    address = secured.address.replace("tls://", "tcp://")
    with pytest.raises(ClusterError, match="encryption required"):
        headrace.connect(address, timeout=1.0)
    plain = {"distributed.comm.require-encryption": False}
    with dask.config.set(plain), pytest.raises(ClusterError, match="no Dask scheduler answers"):
        headrace.connect(address, timeout=1.0)


def test_a_foreign_certificate_is_refused(
    secured: headrace.Database, sets: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    with dask.config.set(sets[1]), pytest.raises(ClusterError, match="no Dask scheduler answers"):
        headrace.connect(secured.address, timeout=1.0)


class _Bomb:
    """What a stranger would have unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("to", ["scheduler", "worker"])
def test_a_pickle_from_a_stranger_is_never_read(secured: headrace.Database, tmp_path: Path, to: str) -> None:
    address = secured.address if to == "scheduler" else next(iter(secured.workers))
    host, _, port = address.removeprefix("tls://").rpartition(":")
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    with socket.create_connection((host, int(port)), timeout=5.0) as peer:
        peer.sendall(struct.pack("<QQ", 1, len(bomb)) + bomb)
        try:
            # A TLS server answers plaintext with an alert at most, and hangs up.
            while peer.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert not (tmp_path / "exploded").exists()
    assert secured.collections() is not None, "the cluster goes on"
