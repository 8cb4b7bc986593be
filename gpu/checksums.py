"""By what a file is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["checksum", "checksum_of"]

_PIECE = 1 << 20
_BYTES = 16


def checksum(content: bytes) -> str:
    """BLAKE2b of the content, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=_BYTES).hexdigest()


def checksum_of(file: Path) -> tuple[int, str]:
    """Size in bytes, and `checksum` of what a file holds."""
    digest, size = hashlib.blake2b(digest_size=_BYTES), 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            size += len(piece)
            digest.update(piece)
    return size, digest.hexdigest()
