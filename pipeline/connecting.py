"""Coming to a cluster, or starting one: `connect`, and `connect_async` for programs that await."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from typing import Any

from headrace.gpu.errors import BackendError, ClusterError
from headrace.pipeline import config, encryption
from headrace.pipeline.arguments import seconds
from headrace.pipeline.client import Database
from headrace.pipeline.client_async import AsyncDatabase
from headrace.pipeline.launch import cannot_listen, cluster_options, plugins_from_config, refuse_for_a_running_cluster

__all__ = ["connect", "connect_async"]

_CONNECT_SECONDS = 10.0
_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


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
        ``"tcp://host:8786"`` of a running Dask scheduler, ``"tls://host:8786"`` of one that encrypts; Headrace is put
        on it if it is not there yet. Without one, a cluster is started that ends with this program.
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
        Seconds to wait for a scheduler at `address`, also for the next one if it ends meanwhile.

    Raises
    ------
    ClusterError
        No scheduler answers at `address`.
    ConfigError
        An option cannot be, or is given with an address and is for a cluster that is started; certificates are needed
        and are not there.
    """
    import distributed

    from headrace.pipeline.dask_client import PatientClient

    address, timeout = _checked(address, backend, timeout)
    until = time.monotonic() + timeout
    if address is not None:
        refuse_for_a_running_cluster(workers=workers, processes=processes, dashboard=dashboard, host=host, port=port)
    workers, processes, host, port = _defaults(workers, processes, host, port)
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        try:
            owns.append(distributed.LocalCluster(**options))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise cannot_listen("cluster", host, port, error) from error
    try:
        dask_client = PatientClient(  # type: ignore[no-untyped-call]
            owns[0] if owns else address, direct_to_workers=True, timeout=timeout, set_as_default=False
        )
    except (OSError, ValueError, TimeoutError, RuntimeError) as error:
        for thing in owns:
            thing.close()
        raise _no_scheduler(address, error) from error
    plugins = plugins_from_config(workers if owns else 1, backend)
    try:
        dask_client.sync(_put_on, dask_client, plugins, address, until)  # type: ignore[no-untyped-call]
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

    address, timeout = _checked(address, backend, timeout)
    until = time.monotonic() + timeout
    if address is not None:
        refuse_for_a_running_cluster(workers=workers, processes=processes, dashboard=dashboard, host=host, port=port)
    workers, processes, host, port = _defaults(workers, processes, host, port)
    owns: list[Any] = []
    if address is None:
        options = cluster_options(workers, processes=processes, dashboard=dashboard, host=host, port=port)
        try:
            owns.append(await distributed.LocalCluster(**options, asynchronous=True))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise cannot_listen("cluster", host, port, error) from error
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
    plugins = plugins_from_config(workers if owns else 1, backend)
    try:
        await _put_on(dask_client, plugins, address, until)
    except BaseException:
        for thing in (dask_client, *owns):
            await thing.close()
        raise
    return AsyncDatabase(dask_client, owns=owns)


async def _put_on(dask_client: Any, plugins: Sequence[Any], address: str | None, until: float) -> None:
    """Register the plugins; anew, until `until` (monotonic), if the scheduler goes meanwhile.

    One that is there may take longer than that: its workers are made ready first.
    """
    from distributed.comm.core import CommClosedError

    pause = _PAUSE
    while True:
        try:
            for plugin in plugins:
                await dask_client.register_plugin(plugin)
            return
        except OSError as error:
            # How a call and how a new connection fail; other kinds, also of the base, come from the plugins themselves.
            if not isinstance(error, CommClosedError) and type(error) is not OSError:
                raise
            if time.monotonic() >= until:
                raise _no_scheduler(address, error) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _defaults(
    workers: int | None, processes: bool | None, host: str | None, port: int | None
) -> tuple[int, bool, str, int]:
    return 2 if workers is None else workers, bool(processes), "127.0.0.1" if host is None else host, port or 0


def _checked(address: object, backend: object, timeout: object) -> tuple[str | None, float]:
    """What can be said to be wrong before anybody is asked; the address, and the timeout in seconds."""
    config.check()
    config.apply_dask_defaults()
    checked = None if address is None else encryption.checked_address(address, "client")
    if backend not in (None, "auto", "host", "rapids"):
        raise BackendError(f"unknown backend {backend!r}: use 'auto', 'host' or 'rapids'")
    return checked, seconds("timeout", timeout, _CONNECT_SECONDS)


def _no_scheduler(address: str | None, error: Exception) -> ClusterError:
    from distributed.comm.core import CommClosedError

    if why := encryption.refusal(error):
        return ClusterError(
            f"the scheduler at {address} and this client do not accept each other's certificates ({why}): use those of "
            "one set on both sides"
        )
    cure = "start one with 'headrace up', or check the address"
    if address and address.startswith("tcp://") and isinstance(error, CommClosedError):  # it hangs up on us
        cure = f"if it encrypts, its address is tls{address[3:]}"
    return ClusterError(f"no Dask scheduler answers at {address} ({type(error).__name__}: {error}): {cure}")
