"""Encryption (TLS) as Dask is configured for it: whether it is required, and whether its certificates can be used.

Looked at before anything listens or connects: Dask itself would answer with a traceback, or not at all. The settings
are Dask's own (https://distributed.dask.org/en/stable/tls.html); ``cluster/deploy/certificates.sh`` writes them.
"""

from __future__ import annotations

import re
import socket
import ssl

from headrace.gpu.errors import ConfigError

__all__ = ["check_certificates", "checked_address", "greet", "refusal", "required", "scheme"]

_ADDRESS = re.compile(r"inproc://.+|([a-z]+://)?(\[[0-9a-fA-F:]+\]|[^\s/:\[\]]+):\d{1,5}")
_CURE = (
    "put the dask-tls.yaml of the cluster's certificates (cluster/deploy/certificates.sh makes them) into "
    "~/.config/dask, or name it in DASK_CONFIG"
)


def required() -> bool:
    """Whether Dask is told to refuse connections that are not encrypted."""
    import dask

    return bool(dask.config.get("distributed.comm.require-encryption", None))


def scheme() -> str:
    """What addresses here begin with: ``tls`` or ``tcp``."""
    return "tls" if required() else "tcp"


def checked_address(address: object, role: str) -> str:
    """A scheduler's address with its scheme, which may be left out.

    Parameters
    ----------
    address : object
        Such as ``"tls://10.0.0.1:8786"``.
    role : {"client", "worker"}
        As whom it is connected to: each has a certificate.

    Raises
    ------
    ConfigError
        It is no address, is not encrypted though that is required, or needs certificates that are not there.
    """
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
        raise ConfigError(f"{address!r} is no scheduler's address: give one such as 'tcp://127.0.0.1:8786'")
    if "://" not in address:
        address = f"{scheme()}://{address}"
    if address.startswith("tls://"):
        check_certificates(role, of=address)
    elif required() and not address.startswith("inproc://"):
        raise ConfigError(
            f"{address} is not encrypted, and encryption is required here (distributed.comm.require-encryption): "
            f"give tls://{address.partition('://')[2]}"
        )
    return address


def check_certificates(*roles: str, of: str = "") -> None:
    """Raise `ConfigError` if a role has no certificate, or one that cannot be used.

    Parameters
    ----------
    roles : {"client", "scheduler", "worker"}
    of : str
        The address that they are needed for; else they are because encryption is required.
    """
    import dask
    from distributed import Security

    why = f"{of} can be reached with certificates only" if of else "encryption is required"
    for role in roles:
        names = ["ca-file", f"{role}.cert", f"{role}.key"]
        known = {name: dask.config.get(f"distributed.comm.tls.{name}", None) for name in names}
        # A key may lie in the same file as its certificate.
        lacking = [f"distributed.comm.tls.{name}" for name in names[:2] if not known[name]]
        if lacking:
            raise ConfigError(f"{why}, and Dask's configuration has none ({' and '.join(lacking)}): {_CURE}")
        try:
            Security().get_connection_args(role)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:  # which does not name the file
            files = ", ".join(f"{name} {path}" for name, path in known.items() if path and "\n" not in path)
            raise ConfigError(f"{why}, and these cannot be used: {error} (distributed.comm.tls: {files})") from error


def greet(host: str, port: int, timeout: float) -> None:
    """Connect to a scheduler as a client does, and go: it listens. Blocks.

    Raises
    ------
    OSError
        Nobody listens there, or not to this certificate.
    """
    from distributed import Security

    with socket.create_connection((host, port), timeout=timeout) as peer:
        if required():
            # Without a handshake, the scheduler's log would say that one failed.
            context = Security().get_connection_args("client")["ssl_context"]  # type: ignore[no-untyped-call]
            with context.wrap_socket(peer):
                pass


def refusal(error: BaseException | None) -> str:
    """What the other side, or this one, had against a certificate; empty where it was something else."""
    while error is not None:
        error = getattr(error, "real_error", None) or error  # as tornado keeps it
        if isinstance(error, ssl.SSLError):
            return getattr(error, "reason", None) or str(error)
        error = error.__cause__ or error.__context__
    return ""
