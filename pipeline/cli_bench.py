"""``headrace bench``: the benchmarks of the source tree, by name."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

import click

import headrace
from headrace.gpu.errors import ConfigError
from headrace.pipeline.cli_common import Command, table

__all__ = ["bench", "benchmarks"]


@click.command(cls=Command, context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str | None, arguments: tuple[str, ...]) -> int:
    """Run benchmark NAME, or list them all.

    What follows NAME goes to the benchmark; `headrace bench NAME --help` says what it takes.

    \b
    Examples:
      headrace bench
      headrace bench freshness --json freshness.json
      headrace bench store --part search --part filters
    """
    root = Path(headrace.__file__).resolve().parent.parent
    found = benchmarks(root / "benchmarks")
    if name is None:
        table("", ["benchmark", "what it measures"], sorted(found.items()))
        return 0
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(found))}"
        raise ConfigError(f"there is no benchmark {name!r}: {hint}")
    # In front, or another project's folder of the same name would be imported.
    sys.path.insert(0, str(root))
    return int(importlib.import_module(f"benchmarks.{name}").main(list(arguments)))


def benchmarks(folder: Path) -> dict[str, str]:
    """Name and first line of every benchmark in `folder`: the modules that have a ``main``.

    Raises
    ------
    ConfigError
        There are none, as where Headrace was installed from a wheel.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    if not found:
        raise ConfigError(
            f"there are no benchmarks in {folder}: the installed package has none, run them from the source tree"
        )
    return found
