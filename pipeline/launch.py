"""Starting clusters and putting Headrace on them."""

from __future__ import annotations

import errno
import ipaddress
import os
from typing import Any

from headrace.cluster.coordinator import CoordinatorSettings
from headrace.cluster.scheduler import HeadraceScheduler
from headrace.cluster.snapshot_settings import SnapshotSettings
from headrace.gpu.errors import ClusterError, ConfigError
from headrace.gpu.gather import GatherSettings
from headrace.gpu.store import StoreSettings
from headrace.pipeline import config, encryption
from headrace.pipeline.arguments import snapshot_url
from headrace.pipeline.ingest_settings import IngestSettings
from headrace.pipeline.node import HeadraceWorker
from headrace.streams.reader import ReaderSettings

__all__ = [
    "cannot_listen",
    "check_host",
    "cluster_options",
    "dashboard_address",
    "plugins_from_config",
    "refuse_for_a_running_cluster",
]


_CURES = {
    errno.EADDRINUSE: "is the port taken?",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "ports below 1024 are the administrator's",
}
"""What to do about an address at which nothing can listen."""


def check_host(host: str) -> None:
    """Refuse to listen where others can reach: whoever reaches a Dask port can run code there.

    Raises
    ------
    ConfigError
        `host` is no loopback address and Dask is not told to require encryption (TLS); or it is, and has no
        certificates.
    """
    if encryption.required():
        encryption.check_certificates("scheduler", "worker", "client")
    elif not _loopback(host):
        raise ConfigError(
            f"refusing to listen on {host} without TLS, because whoever reaches a Dask port can run code: "
            "use 127.0.0.1, or set distributed.comm.require-encryption and the certificates under distributed.comm.tls"
        )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cannot_listen(what: str, host: str, port: int, error: BaseException) -> ClusterError:
    """The sentence for what could not begin to listen; Dask hides the cause behind an error of its own."""
    if "Nanny failed" in str(error):
        return ClusterError(
            "the worker processes did not start: each of them reads the program anew, so what the program does must "
            "stand below `if __name__ == '__main__':`; if it does, what they say above is the cause"
        )
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    cure = _CURES.get(getattr(error, "errno", None) or 0, "")
    return ClusterError(f"no {what} can listen at {host}:{port} ({error}){f': {cure}' if cure else ''}")


def refuse_for_a_running_cluster(**given: object) -> None:
    """Refuse what only a cluster that is started can be told, where an address is given; None is not given.

    Raises
    ------
    ConfigError
        Something is given; it names it.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} cannot be chosen for a cluster that runs already: leave it out, or leave out the "
                "address to start a cluster"
            )


def cluster_options(workers: int, *, processes: bool, dashboard: str | None, host: str, port: int) -> dict[str, Any]:
    """Arguments for `distributed.LocalCluster`.

    Raises
    ------
    ConfigError
        As `check_host`; or `workers` is not at least 1.
    """
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigError(f"{workers!r} workers cannot hold anything: give a whole number, 1 or more")
    check_host(host)
    options: dict[str, Any] = {
        "n_workers": workers,
        "processes": processes,
        "threads_per_worker": 1,
        "memory_limit": 0,  # an index lives outside of what Dask spills or counts
        "dashboard_address": dashboard_address(dashboard, host),
        "worker_dashboard_address": "127.0.0.1:0",
    }
    if processes:
        options |= {"host": host, "scheduler_port": port}
    return options


def plugins_from_config(workers: int = 1, backend: str | None = None) -> tuple[HeadraceScheduler, HeadraceWorker]:
    """The two plugins with the settings of ``headrace.yaml``; `workers` on this machine share its cores for
    encoding.
    """
    reader = ReaderSettings(
        max_batch=config.get("ingest.max-batch"),
        batches_in_flight=config.get("ingest.batches-in-flight"),
        max_bytes_in_flight=config.get("ingest.max-bytes-in-flight"),
        fetch_wait=config.get("ingest.fetch-wait"),
        poll=config.get("ingest.poll"),
        commit_interval=config.get("ingest.commit-interval"),
        kafka=config.kafka_settings(),
    )
    ingest = IngestSettings(
        reader=reader,
        max_texts=config.get("ingest.max-texts"),
        texts_in_flight=config.get("ingest.texts-in-flight"),
        max_record_bytes=config.get("ingest.max-record-bytes"),
        apply_deadline=config.get("ingest.apply-deadline"),
        retry_delay=config.get("ingest.retry-delay"),
        retry_delay_max=config.get("ingest.retry-delay-max"),
    )
    store = StoreSettings(
        seal_rows=config.get("store.seal-rows"),
        build_threads=config.get("store.build-threads"),
        maintenance_memory=config.get("store.maintenance-memory"),
        settle_after=config.get("store.settle-after"),
        memory_limit=config.get("store.memory-limit"),
    )
    threads = config.get("encoder.threads") or max(1, (os.cpu_count() or 1) // workers)
    coordinator = CoordinatorSettings(
        min_rows=config.get("codebook.min-rows"),
        sample_rows=config.get("codebook.sample-rows"),
        iterations=config.get("codebook.iterations"),
        survey=config.get("placement.survey"),
        rebalance_rows=config.get("placement.rebalance-rows"),
        silence=config.get("ingest.apply-deadline"),
        grace=config.get("scheduler.grace"),
        drain=config.get("worker.drain"),
        snapshots=SnapshotSettings(
            url=snapshot_url(config.get("snapshots.url") or ""),
            every=config.get("snapshots.every"),
            keep=config.get("snapshots.keep"),
            options=config.snapshot_options(),
            gather=config.get("scheduler.grace"),
        ),
    )
    gather = GatherSettings(
        at_once=config.get("search.at-once"),
        most=config.get("search.batch"),
        window=config.get("search.batch-window"),
    )
    worker = HeadraceWorker(
        backend or config.get("backend"),
        store,
        ingest,
        threads,
        gather,
        move_rate=config.get("placement.move-rate"),
        coordinator=coordinator,
        patience=config.get("scheduler.patience"),
    )
    return HeadraceScheduler(coordinator), worker


def dashboard_address(dashboard: str | None, host: str) -> str:
    """Where the dashboard listens.

    A bare ``:port`` is for this machine alone, wherever the scheduler listens: Dask would take every address of the
    machine, and asks nobody who looks at it for a certificate.

    Raises
    ------
    ConfigError
        As `check_host`; or there is no port in `dashboard`.
    """
    given, _, port = (dashboard or ":0").rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(f"dashboard={dashboard!r} cannot be: give a port such as ':8787', or an address and a port")
    check_host(given or host)
    return f"{given or (host if _loopback(host) else '127.0.0.1')}:{port}"
