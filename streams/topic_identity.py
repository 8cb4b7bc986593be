"""Whether a topic is still the one that was indexed. Pure.

A topic that was deleted and made anew has its old name and another log: its offsets do not compare with those that were
read, and a smaller one is no older version.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Seen", "another", "changes", "made_anew"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A topic as it is.

    Attributes
    ----------
    topic_id : str
        Kafka's own of it; "" where the broker has none, as the embedded one.
    partitions : int
    """

    topic_id: str
    partitions: int


def another(known: str, seen: str) -> bool:
    """True if two topic ids are of two topics; one that is not known may be any."""
    return bool(known and seen and known != seen)


def made_anew(topic: str, known: str, seen: str) -> str:
    """What a person is told of a topic that is another than before."""
    return (
        f"topic {topic!r} was deleted and made anew (id {seen}, before {known}): what was indexed of the old one is "
        "gone from here too, and the new one is read from its start"
    )


def changes(topic: str, partitions: int, known: str, now: Seen) -> list[str]:
    """What a person should know of a topic that is `now`. Pure.

    Parameters
    ----------
    partitions : int
        Topic partitions that the collection was built on.
    known : str
        Id of the topic that it was built on; "" where that is not known.
    """
    if another(known, now.topic_id):
        return [made_anew(topic, known, now.topic_id)]  # nothing is kept: any number of topic partitions will do
    if now.partitions != partitions:
        return [
            f"topic {topic!r} has {now.partitions} topic partitions and the collection was built on {partitions}: ids "
            "map to others now, and records of new topic partitions are not read; build a new collection from the topic"
        ]
    return []
