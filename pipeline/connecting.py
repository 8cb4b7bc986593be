"""Coming to a cluster, or starting one: `connect`, and `connect_async` for programs that await."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from headrace.gpu.errors import BackendError, ClusterError, ConfigError
from headrace.pipeline import config
from headrace.pipeline.arguments import seconds
from headrace.pipeline.client import Database
from headrace.pipeline.client_async import AsyncDatabase
from headrace.pipeline.launch import cluster_options, plugins_from_config, refuse_for_a_running_cluster

__all__ = ["connect", "connect_async"]

_CONNECT_SECONDS = 10.0
_ADDRESS = re.compile(r"inproc://.+|([a-z]+://)?(\[[0-9a-fA-F:]+\]|[^\s/:\[\]]+):\d{1,5}")


def connect(
    address: str | None = None,
    *,
    workers: int | None = None,
    processes: bool | None = None,
    backend: str | None = None,
    dashboard: str | None = None,
    host: str | None = None,
    port: int | None = None,
    timeout: float = _CONNECT_SECONDS,
) -> Database:
    """Connect to a cluster, or start one.

    Parameters
    ----------
    address : str, optional
        ``"tcp://host:8786"`` of a running Dask scheduler; Headrace is put on it if it is not there yet. Without one, a
        cluster is started that ends with this program.
    workers : int, optional
        Of a cluster that is started; 2 by default.
    processes : bool, optional
        Start workers as processes of their own, which Dask's nannies restart if they die; otherwise they live in
        this process.
    backend : {"auto", "host", "rapids"}, optional
    dashboard : str, optional
        ``":8787"`` for Dask's dashboard (needs bokeh).
    host, port : optional
        Where the scheduler listens when `processes` is true: 127.0.0.1 and any free port by default; other hosts than
        the loopback need TLS.
    timeout : float
        Seconds to wait for a scheduler at `address`.

    Raises
    ------
    ClusterError
        No scheduler answers at `address`.
    ConfigError
        An option cannot be, or is given with an address and is for a cluster that is started.
    """
    import distributed

    from headrace.pipeline.dask_client import PatientClient

    timeout = _checked(address, backend, timeout)
    if address is not None:
        refuse_for_a_running_cluster(workers=workers, processes=processes, dashboard=dashboard, host=host, port=port)
    workers, processes, host, port = _defaults(workers, processes, host, port)
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        try:
            owns.append(distributed.LocalCluster(**options))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _no_cluster(host, port, error) from error
    try:
        dask_client = PatientClient(  # type: ignore[no-untyped-call]
            owns[0] if owns else address, direct_to_workers=True, timeout=timeout, set_as_default=False
        )
    except (OSError, ValueError, TimeoutError, RuntimeError) as error:
        for thing in owns:
            thing.close()
        raise _no_scheduler(address, error) from error
    scheduler_plugin, worker_plugin = plugins_from_config(workers if owns else 1, backend)
    try:
        dask_client.register_plugin(scheduler_plugin)
        dask_client.register_plugin(worker_plugin)
    except BaseException:
        for thing in (dask_client, *owns):
            thing.close()
        raise
    return Database(AsyncDatabase(dask_client), owns)


def connect_async(
    address: str | None = None,
    *,
    workers: int | None = None,
    processes: bool | None = None,
    backend: str | None = None,
    dashboard: str | None = None,
    host: str | None = None,
    port: int | None = None,
    timeout: float = _CONNECT_SECONDS,
) -> _Connecting:
    """As `connect`, for programs that await: everything runs on the calling event loop.

    Both ``db = await connect_async()`` and ``async with connect_async() as db`` will do.
    """
    return _Connecting(
        address,
        {
            "workers": workers,
            "processes": processes,
            "backend": backend,
            "dashboard": dashboard,
            "host": host,
            "port": port,
            "timeout": timeout,
        },
    )


class _Connecting:
    """A connection to be awaited, or to be entered."""

    def __init__(self, address: str | None, options: dict[str, Any]) -> None:
        self._address, self._options = address, options

    def __await__(self) -> Generator[Any, None, AsyncDatabase]:
        return _connect_async(self._address, **self._options).__await__()

    async def __aenter__(self) -> AsyncDatabase:
        self._db = await self
        return self._db

    async def __aexit__(self, *exc: object) -> None:
        await self._db.close()


async def _connect_async(
    address: str | None,
    *,
    workers: int | None,
    processes: bool | None,
    backend: str | None,
    dashboard: str | None,
    host: str | None,
    port: int | None,
    timeout: float,
) -> AsyncDatabase:
    import distributed

    from headrace.pipeline.dask_client import PatientClient

    timeout = _checked(address, backend, timeout)
    if address is not None:
        refuse_for_a_running_cluster(workers=workers, processes=processes, dashboard=dashboard, host=host, port=port)
    workers, processes, host, port = _defaults(workers, processes, host, port)
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        try:
            owns.append(await distributed.LocalCluster(**options, asynchronous=True))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _no_cluster(host, port, error) from error
    try:
        dask_client = await PatientClient(  # type: ignore[no-untyped-call]
            owns[0] if owns else address,
            direct_to_workers=True,
            timeout=timeout,
            set_as_default=False,
            asynchronous=True,
        )
    except (OSError, ValueError, TimeoutError, RuntimeError) as error:
        for thing in owns:
            await thing.close()
        raise _no_scheduler(address, error) from error
    scheduler_plugin, worker_plugin = plugins_from_config(workers if owns else 1, backend)
    try:
        await dask_client.register_plugin(scheduler_plugin)
        await dask_client.register_plugin(worker_plugin)
    except BaseException:
        for thing in (dask_client, *owns):
            await thing.close()
        raise
    return AsyncDatabase(dask_client, owns=owns)


def _defaults(
    workers: int | None, processes: bool | None, host: str | None, port: int | None
) -> tuple[int, bool, str, int]:
    return 2 if workers is None else workers, bool(processes), "127.0.0.1" if host is None else host, port or 0


def _checked(address: object, backend: object, timeout: object) -> float:
    """What can be said to be wrong before anybody is asked; the timeout in seconds."""
    config.check()
    config.apply_dask_defaults()
    if address is not None and (not isinstance(address, str) or not _ADDRESS.fullmatch(address)):
        raise ConfigError(f"{address!r} is no scheduler's address: give one such as 'tcp://127.0.0.1:8786'")
    if backend not in (None, "auto", "host", "rapids"):
        raise BackendError(f"unknown backend {backend!r}: use 'auto', 'host' or 'rapids'")
    return seconds("timeout", timeout, _CONNECT_SECONDS)


def _no_cluster(host: str, port: int, error: RuntimeError) -> ClusterError:
    return ClusterError(
        f"no cluster could be started at {host}:{port} ({error.__cause__ or error}): is the port taken?"
    )


def _no_scheduler(address: str | None, error: Exception) -> ClusterError:
    return ClusterError(
        f"no Dask scheduler answers at {address} ({type(error).__name__}: {error}): start one with 'headrace up', "
        "or check the address"
    )
