"""The command line: every mistake is one sentence on stderr and an exit code, and what was typed right works."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import dask.config
import numpy as np
import pytest

from headrace.gpu.errors import ConfigError
from headrace.pipeline import cli, cli_bench, cli_cluster, cli_common, cli_records, config
from headrace.pipeline.cli_bench import benchmarks
from headrace.pipeline.cli_cluster import _recall
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.topics import Offsets

Capture = pytest.CaptureFixture[str]
COMMANDS = sorted(cli.commands.commands)


@pytest.fixture
def nowhere() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        host, port = sock.getsockname()
    return f"{host}:{port}"


def sentence(capture: Capture) -> str:
    """What was told on stderr: exactly one line, and no traceback."""
    (line,) = capture.readouterr().err.splitlines()
    assert line.startswith("headrace: ")
    return line


def test_the_commands_are_there() -> None:
    known = "bench create demo drain drop ingest produce restore scheduler search snapshot status up verify worker"
    assert known.split() == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_the_parser_takes(command: str, capsys: Capture) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"headrace {command}" in text.partition("Examples:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_sentence(command: str, capsys: Capture) -> None:
    assert cli.main([command, "--colour", "red"]) == 2
    line = sentence(capsys)
    assert "--colour" in line
    assert f"headrace {command} --help" in line


def test_an_unknown_command_and_none(capsys: Capture) -> None:
    assert cli.main(["serch"]) == 2
    assert "serch" in sentence(capsys)
    assert cli.main([]) == 2
    assert "Examples:" in capsys.readouterr().err


def test_starting_loads_nothing_heavy() -> None:
    program = "import sys, headrace.pipeline.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "dask", "distributed", "confluent_kafka", "faiss", "rich", "pandas"} & set(loaded)


def test_a_configuration_that_cannot_be_is_told_first(capsys: Capture) -> None:
    config.check()
    with dask.config.set({"headrace.cels": 3}):
        assert cli.main(["status"]) == 1
    assert "headrace.cells" in sentence(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["create", "docs", "--dim", "3"],
        ["search", "docs", "red shoes"],
        ["ingest", "docs"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_scheduler_that_is_not_there(
    arguments: list[str], nowhere: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_common, "PATIENCE", 0.3)
    assert cli.main([*arguments, "--cluster", f"tcp://{nowhere}"]) == 1
    assert nowhere in sentence(capsys)


def test_debug_shows_the_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["search", "docs", "x", "--consistency", "soon"]
    assert cli.main(wrong) == 2
    assert "'soon'" in sentence(capsys)
    assert cli.main([*wrong, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HEADRACE_DEBUG", "1")
    assert cli.main(wrong) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("search docs x --consistency strongg", "strongg"),
        ("search docs x --recall-target 2", "recall_target=2"),
        ("create docs --dim 3 --recall-target 2", "recall_target=2"),
        ("create docs:new --dim 3", "docs:new"),
        ("create docs", "--dim"),
        ("create docs --dim 99999", "99999"),
        ("status --cluster nonsense", "nonsense"),
        ("drain tcp://127.0.0.1:1 --deadline 0", "--deadline"),
        ("verify docs --deadline nan", "nan"),
        ("restore x --deadline inf", "--deadline"),
        ("snapshot docs x --every nan", "nan"),
        ("snapshot --list x --keep 2", "--keep"),
    ],
)
def test_what_was_typed_wrong_is_told_before_anybody_is_asked(arguments: str, named: str, capsys: Capture) -> None:
    assert cli.main(arguments.split()) == 2
    assert named in sentence(capsys)


def test_a_question_that_nobody_answers_names_the_option(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cluster:
        dropped: ClassVar[list[str]] = []

        def collection(self, name: str) -> Any:
            return SimpleNamespace(status=lambda: {"rows": 7})

        def drop_collection(self, name: str) -> None:
            self.dropped.append(name)

    @contextmanager
    def connected(_: str) -> Iterator[Cluster]:
        yield Cluster()

    monkeypatch.setattr(cli_cluster, "connected", connected)
    for answer, code in (("", 2), ("n\n", 130), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert cli.main(["drop", "docs"]) == code
        assert ("--yes" in capsys.readouterr().err) == (code == 2)
        assert Cluster.dropped == ["docs"] * (code == 0)


def test_ctrl_c_is_quiet(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_records, "_query", interrupted)
    assert cli.main(["search", "docs", "x"]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip() == ""
    assert captured.out == ""


def test_up_refuses_a_place_that_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["up", "--snapshots", ""]) == 2
    assert "--snapshots is empty" in capsys.readouterr().err


def test_others_may_not_reach_a_cluster_without_tls(capsys: Capture) -> None:
    assert cli.main(["up", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "TLS" in sentence(capsys)


def test_a_port_that_is_taken(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["up", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}" in sentence(capsys)


def test_the_module_is_the_command() -> None:
    told = subprocess.run([sys.executable, "-m", "headrace", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("headrace, version ")


def test_a_scheduler_that_cannot_listen_says_why(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["scheduler", "--port", str(port), "--dashboard", ":0"]) == 1
        assert f"127.0.0.1:{port}" in (line := sentence(capsys))
        assert "is the port taken?" in line


# -- produce -----------------------------------------------------------------------------------------------------------


def written(path: Path, *lines: str | dict[str, Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_produce_without_a_broker(nowhere: str, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["produce", "docs", written(tmp_path / "f", {"id": "a", "text": "x"}), "--broker", nowhere]) == 1
    assert nowhere in sentence(capsys)


def test_produce_to_a_topic_that_is_not_there(broker: EmbeddedBroker, tmp_path: Path, capsys: Capture) -> None:
    file = written(tmp_path / "f", {"id": "a", "text": "x"})
    assert cli.main(["produce", "no-such-topic", file, "--broker", broker.bootstrap]) == 1
    assert "no-such-topic" in sentence(capsys)


def test_produce_from_a_file_that_is_not_there(capsys: Capture) -> None:
    assert cli.main(["produce", "docs", "no-such-file.jsonl"]) == 2
    assert "no-such-file.jsonl" in sentence(capsys)


def test_produce_writes_and_says_how_far_the_topic_is(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture
) -> None:
    rows = [{"id": f"d{number}", "text": "x", "price": number} for number in range(2500)]
    assert cli.main(["produce", topic, written(tmp_path / "f", *rows), "--broker", broker.bootstrap, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["written"], report["refused"]) == (2500, 0)
    offsets = {int(place): offset for place, offset in report["offsets"].items()}
    assert offsets == Offsets(broker.bootstrap, topic).latest()
    assert captured.err == ""


def test_bad_lines_are_told_by_number_and_the_others_go_on(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture
) -> None:
    file = written(
        tmp_path / "f",
        {"id": "a", "text": "x"},
        "{not json",
        "",
        '["a list"]',
        {"text": "no id"},
        {"id": "b"},
        {"id": "c", "text": "x", "nested": {"a": 1}},
        {"id": "d", "text": "y"},
    )
    assert cli.main(["produce", topic, file, "--broker", broker.bootstrap, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["written"], report["refused"]) == (2, 5)
    told = captured.err.splitlines()
    assert [line.partition(" was refused")[0] for line in told] == [f"headrace: line {n}" for n in (2, 4, 5, 6, 7)]
    for line, reason in zip(told, ["not JSON", "an array", "no field 'id'", "neither", "nested"], strict=True):
        assert reason in line
    assert sum(Offsets(broker.bootstrap, topic).latest().values()) == 2


@pytest.mark.parametrize("binary", [False, True])
def test_numbers_that_no_column_holds_are_refused_with_their_line(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture, binary: bool
) -> None:
    """What the producer lets through is what the workers take: here the limits are those of int64."""
    good = [{"id": "max", "n": 2**63 - 1}, {"id": "min", "n": -(2**63)}, {"id": 2**63 - 1}]
    bad = [{"id": "a", "n": 2**63}, {"id": "b", "n": -(2**63) - 1}, {"id": "c", "n": 10**30}, {"id": 2**64}]
    rows = [{"vector": [1, 2], **row} for row in [*good, *bad]]
    double = '{"id": "d", "vector": [1, 2], "n": 1, "n": 2}'
    arguments = ["produce", topic, written(tmp_path / "f", *rows, double), "--broker", broker.bootstrap, "--json"]
    assert cli.main([*arguments, *(["--binary"] if binary else [])]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["written"] == len(good)
    told = captured.err.splitlines()
    assert [line.partition(" was refused")[0] for line in told] == [f"headrace: line {n}" for n in (4, 5, 6, 7, 8)]
    for line, what in zip(told, ["attribute 'n'", "attribute 'n'", "attribute 'n'", f"id {2**64}"], strict=False):
        assert f"{what}" in line
        assert "beyond the range of int64 (-9223372036854775808 to 9223372036854775807)" in line
    assert str(10**30) in told[2], "the number as it was written"
    assert "duplicate key" in told[4]


def test_a_line_too_large_for_kafka_is_refused_by_itself(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture
) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": "x" * 1_100_000}, {"id": "c", "text": "y"}]
    assert cli.main(["produce", topic, written(tmp_path / "f", *rows), "--broker", broker.bootstrap, "--json"]) == 1
    captured = capsys.readouterr()
    assert "line 2 was refused" in captured.err
    assert "message.max.bytes" in captured.err
    assert json.loads(captured.out)["written"] == 2


def test_produce_and_create_partitions_use_the_kafka_settings(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture
) -> None:
    file = written(tmp_path / "f", {"id": "a", "text": "x"})
    arguments = ["produce", topic, file, "--broker", broker.bootstrap]
    for more in ([], ["--create-partitions", "4"]):
        with dask.config.set({"headrace.kafka": {"no.such.setting": 1}}):
            assert cli.main([*arguments, *more]) == 1
        assert "no.such.setting" in sentence(capsys)


def test_records_from_lines() -> None:
    record = cli_records._record
    assert record(b'{"sku": 7, "text": "x", "n": 1}', "sku", False, False) == (b"7", b'{"text":"x","n":1}', None)
    key, value, headers = record(b'{"id": "a", "vector": [1, 2], "text": "x"}', "id", True, False)
    assert (key, value) == (b"a", np.array([1, 2], dtype="<f4").tobytes())
    assert dict(headers or []) == {"headrace-format": b"f32", "headrace-attributes": b'{"text":"x"}'}
    assert record(b'{"id": "a", "what": [1]}', "id", False, True) == (b"a", None, None)


def test_a_line_without_a_vector_cannot_be_binary() -> None:
    with pytest.raises(cli_records.RecordError, match="--binary"):
        cli_records._record(b'{"id": "a", "text": "x"}', "id", True, False)


def test_create_partitions_says_what_an_embedded_broker_cannot_do(
    broker: EmbeddedBroker, tmp_path: Path, capsys: Capture
) -> None:
    file = written(tmp_path / "f", {"id": "a", "text": "x"})
    assert cli.main(["produce", "not-there", file, "--broker", broker.bootstrap, "--create-partitions", "3"]) == 1
    told = capsys.readouterr().err
    assert "embedded broker" in told
    assert "broker.create_topic('not-there', 3)" in told


def test_create_partitions_refuses_another_number(
    broker: EmbeddedBroker, topic: str, tmp_path: Path, capsys: Capture
) -> None:
    file = written(tmp_path / "f", {"id": "a", "text": "x"})
    arguments = ["produce", topic, file, "--broker", broker.bootstrap, "--create-partitions"]
    assert cli.main([*arguments, "4"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "5"]) == 1
    assert "4 topic partitions, not 5" in sentence(capsys)


# -- search, ingest, bench ---------------------------------------------------------------------------------------------


def test_how_fresh_an_answer_must_be() -> None:
    assert cli_records._level("strong") == "strong"
    assert cli_records._level("bounded:250").staleness == 250
    for wrong in ("strong:3", "bounded:x", "bounded:-1", ""):
        with pytest.raises(ConfigError, match="consistency"):
            cli_records._level(wrong)


def test_a_query_is_a_text_or_a_vector() -> None:
    assert cli_records._query("red shoes") == "red shoes"
    assert cli_records._query("[draft] red shoes") == "[draft] red shoes"
    np.testing.assert_array_equal(cli_records._query("[1, 2.5]"), np.array([1, 2.5], dtype=np.float32))
    assert cli_records._query('["red", "shoes"]') == '["red", "shoes"]'
    assert cli_records._query("[[1, 2], [3]]") == "[[1, 2], [3]]"


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_several_vectors_at_once_are_refused(as_json: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "points", "[[1, 2, 3], [3, 4, 5]]", *as_json]) == 2
    assert "of shape (2, 3): give one vector" in capsys.readouterr().err
    assert np.isnan(cli_records._query("[NaN, 1]")[0])  # a vector, which the client refuses
    assert cli_records._query("[1e39, 1]")[0] == 1e39
    assert cli_records._query("[" * 100_000) == "[" * 100_000


def test_waiting_counts_what_the_slowest_worker_lacks() -> None:
    workers = [{"watermarks": {0: 10, 1: 4}}, {"watermarks": {0: 7}}]
    assert cli_records._left(workers, {0: (0, 10), 1: (2, 4)}) == 3 + 2
    assert cli_records._left(workers, {0: (0, 7)}) == 0
    assert cli_records._left([], {0: (0, 7)}) == 7


def test_benchmarks_are_found_by_name(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "pace.py").write_text('"""How fast?\n\nMore."""\n\ndef main(argv):\n    print(argv)\n    return 3\n')
    (folder / "shared.py").write_text('"""No benchmark."""\n')
    assert benchmarks(folder) == {"pace": "How fast?"}

    monkeypatch.setattr(cli_bench, "headrace", SimpleNamespace(__file__=str(tmp_path / "headrace" / "__init__.py")))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert cli.main(["bench", "pace", "--json", "f", "--help"]) == 3
        assert capsys.readouterr().out.strip() == "['--json', 'f', '--help']"
        assert cli.main(["bench"]) == 0
        assert "How fast?" in capsys.readouterr().out
        assert cli.main(["bench", "pase"]) == 1
        assert "did you mean pace" in sentence(capsys)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]


def test_without_the_source_tree_there_are_no_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source tree"):
        benchmarks(tmp_path / "benchmarks")


def test_the_recall_of_a_workers_segments_in_one_cell_of_the_table() -> None:
    walked = {"index": "graph", "recall": 0.961, "effort": 24, "reached": 1.0}
    better = {**walked, "recall": 0.98}
    scanned = {"index": "ivf_pq", "recall": 1.0, "effort": None, "reached": 0.8}
    growing = {"index": "exact", "recall": 1.0, "effort": None, "reached": 1.0}
    assert _recall([better, walked, growing]) == "0.961"
    assert _recall([walked, scanned, scanned]) == "0.961, 2 exact"
    assert _recall([scanned]) == "1 exact"
    assert _recall([growing]) == _recall([]) == "exact"
