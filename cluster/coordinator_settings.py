"""How a coordinator looks after a collection."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.cluster.snapshot_settings import SnapshotSettings

__all__ = ["CoordinatorSettings"]


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """How a collection is looked after.

    Attributes
    ----------
    min_rows, sample_rows, iterations : int
        When the codebook is trained, on how many rows, for how long.
    publish_deadline : float
        Seconds that a worker may take to answer a new state before it leaves the placement.
    move_deadline : float
        Seconds that one worker may take to send its rows on.
    tick : float
        Seconds between looks at what nobody announces: row counts, and workers that had stopped answering.
    survey : float
        Seconds between counts of all cells' rows, by which cells are spread evenly over the workers.
    rebalance_rows : int
        With fewer rows than this nothing is moved for the sake of balance.
    watch : float
        Seconds between questions to every worker whether it still answers.
    silence : float
        Seconds without an answer to that after which a worker leaves the placement.
    grace : float
        Seconds that workers have to return to a scheduler that takes the place of one that was lost; those that do not
        come are counted as lost.
    drain : float
        Seconds that a worker which is closed in order goes on until the others have what it holds; 0: it does not.
    snapshots : SnapshotSettings
    """

    min_rows: int = 4096
    sample_rows: int = 65_536
    iterations: int = 20
    publish_deadline: float = 5.0
    move_deadline: float = 600.0
    tick: float = 0.5
    survey: float = 5.0
    rebalance_rows: int = 20_000
    watch: float = 1.0
    silence: float = 2.0
    grace: float = 5.0
    drain: float = 30.0
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
