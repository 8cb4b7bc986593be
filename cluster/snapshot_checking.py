"""Reading everything that snapshots name, to say which of them are whole. Blocks for as long as that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.cluster.manifests import Entry, Manifest
from headrace.gpu.errors import SnapshotError
from headrace.gpu.snapshot_checks import check_segment, verified
from headrace.gpu.snapshot_place import Place

__all__ = ["checked"]


def checked(url: str, options: Mapping[str, Any], entries: Sequence[Entry]) -> list[Entry]:
    """The entries, with a `problem` where some file is not what the manifest says; each file is read once."""
    place = Place(url, options)
    segments: dict[tuple[str, str], str] = {}
    return [
        entry if entry.manifest is None else replace(entry, problem=_problem(place, entry.manifest, segments))
        for entry in entries
    ]


def _problem(place: Place, manifest: Manifest, segments: dict[tuple[str, str], str]) -> str:
    """What is wrong with a snapshot's files; `segments` are those that were read for others, and what was found."""
    problems: list[str] = []
    for part in manifest.parts:
        for file in part.segments:
            known = (file.uid, file.checksum)
            if known not in segments:
                segments[known] = ""
                try:
                    check_segment(place, file)
                except SnapshotError as error:
                    segments[known] = str(error)
            problems.append(segments[known])
        try:
            with verified(place, part.moment):
                pass
        except SnapshotError as error:
            problems.append(str(error))
    return "; ".join(dict.fromkeys(problem for problem in problems if problem))
