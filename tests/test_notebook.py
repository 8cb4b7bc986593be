"""What is shown to newcomers runs as it is: the notebook, the README's program, its command lines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest

from headrace.gpu.errors import EncoderError
from headrace.pipeline import cli, config, minilm  # noqa: F401  (config: its defaults come before what is set here)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The sentence model, its graph in a folder that goes away."""
    try:
        minilm.find_weights()
    except EncoderError as error:
        pytest.skip(str(error))
    settings = {"cache-dir": str(tmp_path_factory.mktemp("cache")), "backend": "host"}
    with dask.config.set({f"headrace.{name}": value for name, value in settings.items()}):
        yield


def cells(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return found


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_its_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in content["cells"]]
    assert len(set(names)) == len(names)
    for cell in content["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_getting_started_shows_what_it_says(model: None) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for cell in cells(ROOT / "notebooks" / "getting_started.ipynb"):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    except BaseException:
        for name, end in (("db", "close"), ("broker", "stop")):
            if name in names:
                getattr(names[name], end)()
        raise
    assert names["write"].count == 4
    assert names["hits"][0].id == "cake", "the text that is nearest to 'something sweet'"
    assert {hit.id for hit in names["after"]} == {"soup", "bread", "salad"}, "the cake was deleted"
    assert names["after"][0].id == "soup", "the soup is sweet now"
    assert names["soup"].attributes["minutes"] == 20
    assert names["cake"] is None
    assert (names["status"]["state"], names["status"]["rows"]) == ("healthy", 3)
    assert names["verification"].ok, names["verification"].differences
    assert names["verification"].copies == 2


def test_the_program_of_the_readme_runs_as_it_is(model: None, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a2  How to bake bread with only four ingredients")
    assert "Sourdough for beginners" in lines[3]
    assert lines[-1] == "healthy 2 True"


def test_the_command_lines_of_the_readme_are_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("products.jsonl", "gone.jsonl"):
        (tmp_path / name).touch()
    shown = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    lines = [words[1:] for words in shown if words and words[0] == "headrace"]
    assert {words[0] for words in lines} >= {"up", "create", "produce", "ingest", "search", "status", "bench"}
    for name, *arguments in lines:
        with cli.commands.commands[name].make_context(name, list(arguments)):
            pass  # the parser took it
