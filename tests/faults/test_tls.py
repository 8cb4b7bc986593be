"""Row 25: with TLS on, nobody without one of the cluster's certificates gets a word in."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import distributed  # noqa: F401 (its defaults are part of the configuration)
import numpy as np
import psutil
import pytest
import yaml

import headrace
from headrace.gpu.errors import ClusterError, ConfigError, HeadraceError
from headrace.pipeline import cli, processes
from headrace.pipeline.launch import dashboard_address
from headrace.streams.broker import EmbeddedBroker

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "certificates.sh"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


def certificates(folder: Path) -> dict[str, Any]:
    """Dask's settings for a new set of certificates, as a user makes them."""
    subprocess.run(["bash", str(SCRIPT), str(folder)], check=True, capture_output=True, timeout=60)
    assert {path.name for path in folder.iterdir()} == {"ca.pem", "headrace.pem", "headrace-key.pem", "dask-tls.yaml"}
    settings = yaml.safe_load((folder / "dask-tls.yaml").read_text())
    # Dask merges files, but `set` replaces a whole section that it is given.
    return {"distributed.comm": dask.config.merge(dask.config.get("distributed.comm"), settings["distributed"]["comm"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates, with a comma")


@pytest.fixture(scope="module")
def sets(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cluster's certificates, and a stranger's."""
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
    with pytest.raises(ConfigError, match=f"give {secured.address}"):
        headrace.connect(address, timeout=1.0)
    plain = {"distributed.comm.require-encryption": False}
    with dask.config.set(plain), pytest.raises(ClusterError, match=f"its address is {secured.address}"):
        headrace.connect(address, timeout=1.0)


@pytest.mark.timeout(120)
def test_a_foreign_certificate_is_refused(
    secured: headrace.Database, sets: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    with dask.config.set(sets[1]), pytest.raises(ClusterError, match="do not accept each other's certificates"):
        headrace.connect(secured.address, timeout=1.0)
    mixed = {**sets[1]["distributed.comm"]["tls"], "ca-file": sets[0]["distributed.comm"]["tls"]["ca-file"]}
    with (
        dask.config.set({"distributed.comm.require-encryption": True, "distributed.comm.tls": mixed}),
        pytest.raises(ClusterError, match="do not accept each other's certificates"),
    ):
        headrace.connect(secured.address, timeout=3600.0)  # it is not tried again: that would not become better


NONE = {"distributed.comm.require-encryption": None, "distributed.comm.tls.ca-file": None}


def test_a_client_without_certificates_is_told_so_in_one_sentence(
    sets: tuple[dict[str, Any], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with dask.config.set(NONE):
        with pytest.raises(ConfigError, match=r"tls://127\.0\.0\.1:1 can be reached with certificates only.*ca-file"):
            headrace.connect("tls://127.0.0.1:1")
        for arguments in (["status", "--cluster", "tls://127.0.0.1:1"], ["worker", "tls://127.0.0.1:1"]):
            assert cli.main(arguments) == 1
            told = capsys.readouterr().err
            assert told.count("\n") == 1
            assert "certificates.sh" in told


def test_certificates_that_cannot_be_used_are_named(
    sets: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone.pem")
    for name in ("ca-file", "scheduler.cert", "scheduler.key"):
        with dask.config.set(sets[0]), dask.config.set({f"distributed.comm.tls.{name}": gone}):
            assert cli.main(["scheduler", "--port", "0"]) == 1
            told = capsys.readouterr().err
            assert f"{name} {gone}" in told, told
            assert "port" not in told
    with dask.config.set(NONE), dask.config.set({"distributed.comm.require-encryption": True}):
        assert cli.main(["up"]) == 1
        assert "encryption is required" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scheduler", "dashboard"])
def test_an_address_of_another_machine_is_not_called_a_taken_port(
    folder: Path, sets: tuple[dict[str, Any], dict[str, Any]], what: str
) -> None:
    elsewhere = "203.0.113.1"  # nobody's: RFC 5737
    where = {"scheduler": ["--host", elsewhere], "dashboard": ["--dashboard", f"{elsewhere}:0"]}[what]
    ran = subprocess.run(
        [sys.executable, "-m", "headrace", "scheduler", "--port", "0", "--dashboard", ":0", *where],
        capture_output=True,
        text=True,
        env={**os.environ, "DASK_CONFIG": str(folder / "ours" / "dask-tls.yaml")},
        timeout=100,
    )
    assert ran.returncode == 1
    told = ran.stderr.splitlines()[-1]
    assert f"no {what} can listen at {elsewhere}" in told
    assert told.endswith("this machine has no such address")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_scheduler_listens_with_certificates(sets: tuple[dict[str, Any], dict[str, Any]], host: str) -> None:
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with dask.config.set(sets[0]):
        running = asyncio.create_task(processes.run_scheduler(host, 0, None, "host", 1, told.set_result))
        try:
            await asyncio.wait([told, running], return_when=asyncio.FIRST_COMPLETED)
            assert not running.done(), running.exception()
            port = told.result().rpartition(":")[2]
            async with headrace.connect_async(f"127.0.0.1:{port}", timeout=60.0) as db:
                assert db.address == f"tls://127.0.0.1:{port}"
                assert await db.collections() == []
            assert dashboard_address(":8787", host) == "127.0.0.1:8787", "who looks at it is asked for no certificate"
        finally:
            if not running.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await running


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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_cluster_of_the_command_line_works_and_comes_back(
    folder: Path,
    sets: tuple[dict[str, Any], dict[str, Any]],
    broker: EmbeddedBroker,
    topic: str,
    tmp_path: Path,
    host: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with out.open("wb") as stdout, log.open("wb") as stderr:
        up = subprocess.Popen(
            [sys.executable, "-m", "headrace", "up", "--host", host, "--port", "0", "--dashboard", ":0"],
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "DASK_CONFIG": str(folder / "ours" / "dask-tls.yaml")},
            start_new_session=True,
        )
    try:
        until("it runs", lambda: up.poll() is not None or b"Ctrl-C" in out.read_bytes())
        found = re.search(r"scheduler +(tls://\S+)", out.read_text())
        assert found is not None, log.read_text()
        address = found[1]
        assert "handshake failed" not in log.read_text()
        with dask.config.set(sets[0]), headrace.connect(address, timeout=60.0) as db:
            until("two workers are there", lambda: len(workers(db)) == 2)
            before = workers(db)
            docs = db.create_collection(topic, dim=2, replicas=2)
            docs.ingest(broker.bootstrap)
            docs.upsert({"id": "a", "vector": [1, 2]}, wait="searchable", deadline=60.0)
            assert [hit.id for hit in docs.search(np.array([1, 2]))] == ["a"]
            (scheduler,) = [child for child in psutil.Process(up.pid).children() if "scheduler" in child.cmdline()]
            scheduler.kill()
            until("the same workers are back with the next", lambda: workers(db) == before)
            os.kill(next(iter(before.values())), signal.SIGKILL)
            until("another took its place", lambda: len(workers(db)) == 2 and workers(db) != before)
            docs.upsert({"id": "b", "vector": [2, 1]}, wait="searchable", deadline=60.0)
            assert {hit.id for hit in docs.search(np.array([1, 2]), consistency="strong", deadline=60.0)} == {"a", "b"}
            assert cli.main(["status", topic, "--cluster", address.removeprefix("tls://")]) == 0
        capsys.readouterr()
        with dask.config.set(NONE):
            assert cli.main(["status", "--cluster", address]) == 1
        assert "certificates" in capsys.readouterr().err
        with pytest.raises((ssl.SSLError, ConnectionError)):
            stranger(address)
        everybody = psutil.Process(up.pid).children(recursive=True)
        up.send_signal(signal.SIGINT)
        assert up.wait(120) == 0
        assert not psutil.wait_procs(everybody, timeout=60)[1], "Ctrl-C left processes behind"
    finally:
        up.kill()
        up.wait()


def stranger(address: str) -> None:
    """Who encrypts, but has no certificate: the other side hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.removeprefix("tls://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as peer, context.wrap_socket(peer) as secret:
        if not secret.recv(1):
            raise ConnectionError("closed")


def workers(db: headrace.Database) -> dict[str, int]:
    """None while no scheduler answers."""
    try:
        return db.workers
    except HeadraceError:
        return {}


def until(what: str, met: Callable[[], bool], deadline: float = 90.0) -> None:
    end = time.monotonic() + deadline
    while not met():
        assert time.monotonic() < end, f"{what}: not after {deadline:g} s"
        time.sleep(0.05)
