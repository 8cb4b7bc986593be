"""Models that turn texts into vectors, run in this process by ONNX Runtime.

An encoder is known by its *stamp*, ``name@version``. The version changes with whatever would change a vector, so two
vectors may be compared exactly when their stamps agree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from dask.system import CPU_COUNT

from headrace.gpu.errors import EncoderError
from headrace.pipeline import config, minilm

__all__ = ["Encoder", "EncoderInfo", "chunks", "describe", "known_encoders", "load_encoder"]

log = logging.getLogger("headrace.pipeline")

MAX_TOKENS = 256
"""What MiniLM was trained to read; the rest of a text is left out."""
MAX_CHARACTERS = 8192
"""Cut before tokenising, which takes time for all it is given; 256 tokens seldom reach past 2,000 characters."""

CHUNK_TEXTS = 32
CHUNK_TOKENS = 256
RUN_COST = 12
"""What starting one more run costs, in tokens' worth of time: measured, 3 ms where a token takes 0.24 ms."""


class Encoder(Protocol):
    """Texts to vectors. Every method may be called from several threads at once."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def stamp(self) -> str:
        """``name@version``."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 (n, dim), in the texts' order.

        A text's vector does not depend on its neighbours in the batch, but for rounding (cosine 1 - 1e-6 or better).
        """


@dataclass(frozen=True)
class EncoderInfo:
    """What is to be known of an encoder without loading it."""

    name: str
    version: str
    dim: int

    @property
    def stamp(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


def known_encoders() -> tuple[str, ...]:
    """Names that `load_encoder` takes."""
    return tuple(_KINDS)


def describe(name: str) -> EncoderInfo:
    """Version and dimension of an encoder, from its files on disk; no model is loaded.

    Raises
    ------
    EncoderError
        The name is unknown, or the weights are missing.
    """
    return _kind(name).describe()


def load_encoder(name: str, threads: int | None = None) -> Encoder:
    """The encoder of that name, loaded once per process and number of threads.

    Parameters
    ----------
    name : str
        One of `known_encoders`.
    threads : int, optional
        Threads of one `Encoder.encode` call; None takes the option ``encoder.threads``, else all cores.

    Raises
    ------
    EncoderError
        The name is unknown, the weights are missing or broken, or the model cannot be built.
    """
    kind = _kind(name)
    threads = threads or config.get("encoder.threads") or CPU_COUNT
    # Two workers of one process ask at the same moment: the second waits and takes what the first has loaded.
    with _loading:
        info = kind.describe()
        key = (info.stamp, threads)
        if key not in _loaded:
            _loaded[key] = kind.load(info, threads)
        return _loaded[key]


def chunks(lengths: Sequence[int]) -> list[list[int]]:
    """Which texts to run together, as positions in `lengths`.

    Texts of like length go together, because a run pads all its texts to the longest of them; a new chunk begins where
    the padding would cost more than another run does. Chunks stay small on purpose: the model is no faster on more than
    a few dozen tokens at a time, and the memory of a run, and the wait of whoever shares the cores with it, grow.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text, at least 1.

    Returns
    -------
    list of list of int
        Every position once; at most `CHUNK_TEXTS` texts in a chunk and, padded, `CHUNK_TOKENS` tokens.
    """
    done: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[position]
        padding = len(current) * (length - longest)
        full = len(current) == CHUNK_TEXTS or (len(current) + 1) * length > CHUNK_TOKENS
        if current and (full or padding > RUN_COST):
            done.append(current)
            current = []
        current.append(position)
        longest = length
    return [*done, current] if current else done


class _OnnxEncoder:
    """A tokenizer and an ONNX graph that pools and normalises; `run` and the tokenizer are both safe to share."""

    def __init__(self, info: EncoderInfo, graph: Path, tokenizer: Path, threads: int) -> None:
        self.name, self.version, self.dim, self.stamp = info.name, info.version, info.dim, info.stamp
        self._session = _session(info.name, graph, threads)
        self._tokenizer = _tokenizer(info.name, tokenizer)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        tokens = [found.ids for found in self._tokenizer.encode_batch_fast([_readable(text) for text in texts])]
        vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
        for rows in chunks([len(ids) for ids in tokens]):
            longest = len(tokens[rows[-1]])
            ids = np.zeros((len(rows), longest), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, position in enumerate(rows):
                found = tokens[position]
                ids[row, : len(found)] = found
                mask[row, : len(found)] = 1
            (vectors[rows],) = self._session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})
        if not np.isfinite(vectors).all():
            raise EncoderError(
                f"encoder {self.stamp} gave a vector that is not finite: its weights are broken, fetch them again"
            )
        return vectors


def _readable(text: str) -> str:
    text = text[:MAX_CHARACTERS]
    # A lone surrogate (JSON can spell one) is no text in UTF-8, which the tokenizer insists on.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _session(name: str, graph: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the cores from the worker beside this one: two workers of two threads on
    # two cores encode a third more without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The arena keeps what one run needed for the next: without it every operator of every run asks the system for fresh
    # pages, which took up to two thirds of a run's time. `chunks` bounds what it can grow to. Every batch has its own
    # shape, so a plan of the memory for each would be of no use.
    options.enable_mem_pattern = False
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors have no common root but this
        raise EncoderError(
            f"encoder {name!r}: ONNX Runtime cannot load {graph} ({error}); "
            f"delete {graph.parent} and it will be built again"
        ) from error


def _tokenizer(name: str, file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises the bare Exception
        raise EncoderError(f"encoder {name!r}: {file} is no tokenizer ({error}); fetch it again") from error
    # The published file asks for 128 tokens, and pads every text to them.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    return tokenizer


@dataclass(frozen=True)
class _Kind:
    describe: Callable[[], EncoderInfo]
    load: Callable[[EncoderInfo, int], Encoder]


def _describe_minilm() -> EncoderInfo:
    return EncoderInfo("minilm", minilm.version(minilm.find_weights(config.get("encoder.minilm.path"))), minilm.DIM)


def _load_minilm(info: EncoderInfo, threads: int) -> Encoder:
    folder = minilm.find_weights(config.get("encoder.minilm.path"))
    graph = minilm.graph_file(folder, config.cache_dir())
    return _OnnxEncoder(info, graph, folder / minilm.TOKENIZER, threads)


_KINDS: Mapping[str, _Kind] = {"minilm": _Kind(_describe_minilm, _load_minilm)}
_loaded: dict[tuple[str, int], Encoder] = {}
_loading = threading.Lock()


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise EncoderError(f"unknown encoder {name!r}: the known ones are {', '.join(map(repr, _KINDS))}")
    return _KINDS[name]
