"""Reading the log once more for some keys."""

from __future__ import annotations

import pytest

from headrace.gpu.errors import BrokerError
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.consumer import ReaderSettings
from headrace.streams.lookup import look_up
from headrace.streams.producer import RecordProducer

Acks = list[tuple[bytes | None, int, int]]


def write(broker: EmbeddedBroker, topic: str, records: list[tuple[bytes, bytes | None]]) -> Acks:
    producer = RecordProducer(broker.bootstrap, topic)
    try:
        return list(producer.write([(key, value, []) for key, value in records], 10.0).acks)
    finally:
        producer.close()


def test_only_those_keys_and_only_within_the_spans(broker: EmbeddedBroker, topic: str) -> None:
    keys = [b"a", b"b", b"c"]
    acks = write(broker, topic, [(key, b"%d" % number) for number in range(50) for key in keys] + [(b"a", None)])
    ends: dict[int, int] = {}
    for _, partition, offset in acks:
        ends[partition] = max(ends.get(partition, 0), offset + 1)
    place = next((partition, offset) for key, partition, offset in acks if key == b"b")
    spans = {partition: (0, end) for partition, end in ends.items()}

    def found(wanted: set[bytes], spans: dict[int, tuple[int, int]]) -> list[tuple[bytes | None, bytes | None]]:
        raw = look_up(broker.bootstrap, topic, wanted, spans, ReaderSettings(), 10.0).raw
        return list(zip(raw.keys, raw.values, strict=True))

    a = found({b"a"}, spans)
    assert a[-1] == (b"a", None)
    assert len(a) == 32, "the last ones"
    assert look_up(broker.bootstrap, topic, {b"a"}, spans, ReaderSettings(), 10.0).cut == {b"a"}
    both = found({b"b", b"c"}, spans)
    assert {key for key, _ in both} == {b"b", b"c"}
    assert found({b"b"}, {place[0]: (place[1], place[1] + 1)}) == [(b"b", b"0")]
    assert found({b"nobody"}, spans) == found({b"a"}, {0: (3, 3)}) == found(set(), spans) == []


def test_a_log_that_ends_too_soon_is_an_error(broker: EmbeddedBroker, topic: str) -> None:
    with pytest.raises(BrokerError, match="3 offsets of its log were not read in time"):
        look_up(broker.bootstrap, topic, {b"a"}, {0: (0, 3)}, ReaderSettings(), 10.0, going_on=lambda: False)
