"""Removing what no snapshot needs any more."""

from __future__ import annotations

from collections.abc import Callable, Collection

from headrace.gpu.snapshot_place import Place
from headrace.gpu.snapshot_wire import Part

__all__ = ["sweep"]


def sweep(place: Place, keep: Collection[Part], still: Callable[[], None] = lambda: None) -> int:
    """Remove all segments and moments that no part of `keep` refers to, and what interrupted writes have left.

    Never while any part is being written there. Returns the bytes that were removed.

    Parameters
    ----------
    place : Place
    keep : collection of Part
    still : callable, optional
        Called before each removal, when all is listed: raises where another has begun to write there. What that one
        writes is not in the list, so nothing of it is removed.

    Raises
    ------
    SnapshotError
        The place cannot be listed, or something cannot be removed; or `still` raised it.
    """
    kept = {part.moment.path for part in keep} | {file.path for part in keep for file in part.segments}
    there: dict[str, int] = {}
    for name, size in place.sizes("segments").items():
        path = f"segments/{name.split('/')[0]}"
        there[path] = there.get(path, 0) + size
    there |= {f"moments/{name}": size for name, size in place.sizes("moments").items()}
    there |= {f"snapshots/{name}": 0 for name in place.unfinished("snapshots")}
    gone = [path for path in there if path not in kept]
    emptied = [f"moments/{name}" for name in place.names("moments")]
    gone += [path for path in emptied if not any(file.startswith(f"{path}/") for file in kept)]
    for path in gone:
        still()
        place.remove(path)
    return sum(there.get(path, 0) for path in gone)
