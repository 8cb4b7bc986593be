"""Options under dask.config: the defaults and the schema hold each other, and a wrong setting is named."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask.config
import jsonschema
import pytest
import yaml

from headrace.gpu.errors import ConfigError
from headrace.pipeline import config

HERE = Path(config.__file__).parent
DEFAULTS: dict[str, Any] = yaml.safe_load((HERE / "headrace.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = yaml.safe_load((HERE / "headrace-schema.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """The defaults alone, whatever the machine's own configuration says."""
    with dask.config.set({"headrace": copy.deepcopy(DEFAULTS["headrace"])}):
        yield


def _leaves(section: Mapping[str, Any], rule: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        inner = rule["properties"].get(name, {})
        if "properties" in inner:
            yield from _leaves(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _rules(rule: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield name, rule
    for inner_name, inner in rule.get("properties", {}).items():
        yield from _rules(inner, f"{name}.{inner_name}")


def test_the_schema_is_a_schema_and_the_defaults_keep_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(DEFAULTS, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_yaml_and_schema_have_the_same_options() -> None:
    assert set(_leaves(DEFAULTS["headrace"], SCHEMA["properties"]["headrace"])) == set(config.options())


@pytest.mark.parametrize(("name", "rule"), list(_rules(SCHEMA["properties"]["headrace"], "headrace")))
def test_every_option_is_described(name: str, rule: Mapping[str, Any]) -> None:
    assert rule["description"].endswith(".")


def test_every_default_can_be_read_and_is_commented() -> None:
    config.check()
    for key in config.options():
        config.get(key)
    lines = (HERE / "headrace.yaml").read_text(encoding="utf-8").splitlines()
    for before, line in itertools.pairwise(lines):
        if line.partition("#")[0].rstrip().endswith(":") or not line.strip() or line.lstrip().startswith("#"):
            continue
        assert "#" in line or before.lstrip().startswith("#"), f"no reason given: {line}"


def test_units() -> None:
    with dask.config.set({"headrace.ingest.poll": "250ms", "headrace.ingest.max-record-bytes": "2 MiB"}):
        assert config.get("ingest.poll") == 0.25
        assert config.get("ingest.max-record-bytes") == 2 << 20
    with dask.config.set({"headrace.ingest.poll": 3}):
        assert config.get("ingest.poll") == 3.0


def test_kafka_settings_are_flat_however_they_are_written() -> None:
    with dask.config.set({"headrace.kafka": {"ssl.ca.location": "ca.pem", "security": {"protocol": "SSL"}}}):
        assert config.get("kafka") == {"ssl.ca.location": "ca.pem", "security.protocol": "SSL"}
    with dask.config.set({"headrace.kafka.client.rack": "a"}):
        config.check()
        assert config.get("kafka") == {"client.rack": "a"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ingest.max-batch", "many", "integer, at least 1"),
        ("ingest.max-batch", 0, "at least 1"),
        ("ingest.max-batch", True, "integer"),
        ("ingest.max-batch", 2.5, "integer"),
        ("ingest.max-batch", None, "integer"),
        ("ingest.poll", "soon", "seconds or a text such as '250ms'"),
        ("ingest.poll", "0ms", "more than 0"),
        ("ingest.poll", float("nan"), "more than 0"),
        ("ingest.max-bytes-in-flight", "64 parsecs", "bytes or a text such as '64 MiB'"),
        ("ingest.max-bytes-in-flight", "0 MiB", "at least 1"),
        ("backend", "gpu", "one of auto, host, rapids"),
        ("encoder.minilm.path", 5, "string or null"),
        ("replicas", 17, "at most 16"),
        ("kafka", {"retries": [1]}, "string or number or boolean"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_cure(key: str, value: object, words: str) -> None:
    with dask.config.set({f"headrace.{key}": value}):
        for attempt in (lambda: config.get(key), config.check):
            with pytest.raises(ConfigError) as error:
                attempt()
            message = str(error.value)
            assert f"headrace.{key}" in message
            assert words in message
            assert "DASK_HEADRACE__" + key.upper().replace(".", "__").replace("-", "_") in message


@pytest.mark.parametrize(
    ("written", "meant"),
    [("ingest.max-bach", "ingest.max-batch"), ("replica", "replicas"), ("store.seal_row", "store.seal-rows")],
)
def test_a_misspelt_option_is_an_error_with_the_nearest_one(written: str, meant: str) -> None:
    with (
        dask.config.set({f"headrace.{written}": 1}),
        pytest.raises(ConfigError, match=f"did you mean headrace.{meant}"),
    ):
        config.check()
    with pytest.raises(ConfigError, match=f"did you mean headrace.{meant}"):
        config.get(written)


def test_what_may_be_secret_is_not_shown() -> None:
    for key in ("snapshots.options.secret", "kafka.sasl.password"):
        with dask.config.set({f"headrace.{key}": ["hush"]}), pytest.raises(ConfigError) as refused:
            config.check()
        assert key in str(refused.value)
        assert "hush" not in str(refused.value)


def test_options_of_a_place_keep_their_sections() -> None:
    options = {"key": "me", "client_kwargs": {"endpoint_url": "http://x:9000"}}
    with dask.config.set({"headrace.snapshots.options": options}):
        config.check()
        assert config.snapshot_options() == options


def test_a_section_that_is_a_value() -> None:
    with dask.config.set({"headrace.ingest": 5}), pytest.raises(ConfigError, match=r"headrace\.ingest is 5"):
        config.check()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / "headrace"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.cache_dir() == Path.home() / ".cache/headrace"
    with dask.config.set({"headrace.cache-dir": "~/elsewhere"}):
        assert config.cache_dir() == Path.home() / "elsewhere"


def _fresh(program: str, **variables: str) -> list[str]:
    """What a program says in a process of its own: environment variables are read when dask is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**{name: value for name, value in os.environ.items() if not name.startswith("DASK_")}, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_environment_variables_override() -> None:
    program = (
        "from headrace.pipeline import config; config.check(); print(*map(config.get, ('ingest.max-batch', 'kafka')))"
    )
    said = _fresh(program, DASK_HEADRACE__INGEST__MAX_BATCH="7", DASK_HEADRACE__KAFKA__CLIENT__RACK="a")
    assert said == ["7", "{'client.rack':", "'a'}"]


def test_dask_defaults_yield_to_the_user_s_own() -> None:
    keys = (*config.DASK_DEFAULTS, "distributed.scheduler.bandwidth")
    program = f"""
import dask
from headrace.pipeline import config
for _ in range(2):
    config.apply_dask_defaults()
    print(*(dask.config.get(key) for key in {keys!r}))
"""
    first, second = _chunked(_fresh(program), len(keys))
    assert first == second == [*map(str, config.DASK_DEFAULTS.values()), "100000000"]
    # The second value is Dask's own default, written down by a user: still the user's.
    mine = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "7s", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "30s"}
    said = dict(zip(keys, _fresh(program, **mine), strict=False))
    assert said["distributed.scheduler.worker-ttl"] == "7s"
    assert said["distributed.comm.timeouts.connect"] == "30s"
    assert said["distributed.scheduler.work-stealing"] == "False"


def _chunked(words: list[str], size: int) -> list[list[str]]:
    return [words[start : start + size] for start in range(0, len(words), size)]


def test_defaults_outlive_the_block_in_which_headrace_was_first_used() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import dask, headrace\n"
            "with dask.config.set({'headrace.ingest.max-batch': 77}):\n"
            "    from headrace.pipeline import config\n"
            "    print(config.get('ingest.max-batch'))\n"
            "config.check()\n"
            "print(config.get('ingest.max-batch') == config._DEFAULTS['headrace']['ingest']['max-batch'])\n",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == ["77", "True"]
