"""How many dead letters there are is known to workers that have written none of them."""

from __future__ import annotations

import time

import numpy as np

import headrace
from headrace.pipeline.summary import _dead_letters
from headrace.streams.batches import RawBatch, Refusal
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.dead_letters import DeadLetters


def test_letters_that_were_there_before_the_readers_are_counted(
    db: headrace.Database, broker: EmbeddedBroker, topic: str
) -> None:
    three = np.arange(3)
    raw = RawBatch(topic, [b"k"] * 3, [b"{"] * 3, [None] * 3, three.astype(np.int32), three, three, {}, time.time())
    letters = DeadLetters(broker.bootstrap, topic)
    letters.write(raw, [Refusal(row, "broken") for row in range(3)])
    letters.close()
    collection = db.create_collection(topic, dim=2)
    try:
        collection.ingest(broker.bootstrap)
        until = time.monotonic() + 40
        while (found := collection.status()["ingest"]["dead_letters"]) != 3:
            assert time.monotonic() < until, found
            time.sleep(0.02)
    finally:
        db.drop_collection(topic)


def test_a_letter_is_counted_once_however_many_readers_know_of_it() -> None:
    assert _dead_letters([]) == 0
    # Two readers: both know the topic as it was, and each has written to it since.
    known = [{"dead_letters": 2, "letters": [[0, 60], [1, 3]]}, {"dead_letters": 1, "letters": [[0, 58], [1, 4]]}]
    assert _dead_letters(known) == 64
    assert _dead_letters([{"dead_letters": 2, "letters": []}, {"dead_letters": 1, "letters": []}]) == 3
