"""The command line: every mistake is one sentence on stderr and an exit code, and what was typed right works."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.config
import numpy as np
import pytest

from headrace.gpu.errors import ConfigError
from headrace.pipeline import cli, cli_bench, cli_common, cli_records, config
from headrace.pipeline.cli_bench import benchmarks
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
    known = "bench create demo drain drop ingest produce scheduler search status up verify worker"
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
    assert cli.main(wrong) == 1
    assert "'soon'" in sentence(capsys)
    assert cli.main([*wrong, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HEADRACE_DEBUG", "1")
    assert cli.main(wrong) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_quiet(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_records, "_query", interrupted)
    assert cli.main(["search", "docs", "x"]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip() == ""
    assert captured.out == ""


def test_others_may_not_reach_a_cluster_without_tls(capsys: Capture) -> None:
    assert cli.main(["up", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "TLS" in sentence(capsys)


def test_a_port_that_is_taken(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["up", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}" in sentence(capsys)


def test_the_dashboard_listens_where_the_scheduler_does() -> None:
    from headrace.pipeline.cli_processes import on

    assert on("127.0.0.1", ":8787") == "127.0.0.1:8787"
    assert on("127.0.0.1", "10.0.0.1:80") == "10.0.0.1:80"


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
    for line, reason in zip(told, ["not JSON", "JSON list", "no field 'id'", "neither", "nested"], strict=True):
        assert reason in line
    assert sum(Offsets(broker.bootstrap, topic).latest().values()) == 2


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
