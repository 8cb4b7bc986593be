"""Raw records become ids, attributes and vectors: decoded, the last of each id kept, texts encoded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from headrace.cluster.state import CollectionState
from headrace.gpu.errors import EncoderError
from headrace.pipeline.ingest_settings import Encode, Node
from headrace.pipeline.micro_batch import MicroBatch
from headrace.streams.batches import Decoded, RawBatch, RecordSpec, keep_last
from headrace.streams.records import decode

__all__ = ["Preparer", "texts_to_encode", "vectors_of"]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FEW_RECORDS = 64  # decoded in well under a millisecond: not worth a thread


class Preparer:
    """The two steps before a batch is sent. Belongs to the worker's event loop.

    Parameters
    ----------
    node : Node
    state : CollectionState
        Its spec, and the attributes known so far.
    format : {"json", "binary"}
        Of records that do not say.
    encode : async callable or None
        Texts to float32 (n, dim).
    executor : Executor
        Where large batches are decoded.
    max_record_bytes : int
    """

    def __init__(
        self,
        node: Node,
        state: CollectionState,
        format: str,
        encode: Encode | None,
        executor: Executor,
        max_record_bytes: int,
    ) -> None:
        self._node, self._spec, self._encode, self._executor = node, state.spec, encode, executor
        self._format, self._max_record_bytes = format, max_record_bytes
        self._schema: Mapping[str, str] = dict(state.schema)

    async def decode(self, batch: MicroBatch) -> None:
        """Decode a batch, and keep the last record of each id. The coordinator decides the kind of new attributes."""
        raw = batch.raw
        batch.took["kafka"] = max(0.0, raw.pulled - float(raw.timestamps.min()) / 1e3) if len(raw.keys) else 0.0
        with batch.timed("decode"):
            decoded = await self._decoded(raw)
            unknown = {name: kind for name, kind in decoded.schema.items() if name not in self._schema}
            if unknown:
                answer = await self._node.call_scheduler("learn", collection=self._spec.name, schema=unknown)
                self._schema = dict(answer["schema"])
                if any(self._schema[name] != kind for name, kind in unknown.items()):
                    decoded = await self._decoded(raw)  # another worker met the column first, with another kind
            batch.decoded = keep_last(decoded, raw.topic_partitions, raw.offsets, raw.timestamps)

    async def to_vectors(self, batch: MicroBatch, texts: Sequence[int]) -> None:
        """Give a batch its vectors.

        Parameters
        ----------
        texts : sequence of int
            `texts_to_encode` the decoded batch.

        Raises
        ------
        EncoderError
            There is none, or it answers what cannot be.
        """
        decoded, spec = batch.decoded, self._spec
        assert decoded is not None
        with batch.timed("encode"):
            encoded = None
            if texts:
                if self._encode is None:
                    raise EncoderError(f"collection {spec.name!r} has no encoder for its texts")
                encoded = await self._encode([decoded.texts[row] or "" for row in texts])
                if encoded.shape != (len(texts), spec.dim) or not np.isfinite(encoded).all():
                    raise EncoderError(
                        f"encoder {spec.encoder} answered {encoded.shape} for {len(texts)} texts, or numbers that are "
                        f"not finite; ({len(texts)}, {spec.dim}) finite ones were expected"
                    )
            batch.vectors = vectors_of(decoded, texts, encoded, spec.dim, spec.metric)

    async def _decoded(self, raw: RawBatch) -> Decoded:
        spec = self._spec
        wanted = RecordSpec(
            dim=spec.dim,
            metric=spec.metric,
            ids=spec.ids,
            format=self._format,
            schema=self._schema,
            encoder=spec.encoder,
            max_record_bytes=self._max_record_bytes,
            largest=_FLOAT16_MAX if spec.index.dtype == "float16" else float("inf"),
        )
        if len(raw.keys) <= _FEW_RECORDS:
            return decode(raw, wanted, self._node.backend.frames)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, decode, raw, wanted, self._node.backend.frames)


def texts_to_encode(decoded: Decoded) -> list[int]:
    """Positions of the records that have to be encoded: no deletes, and without a vector."""
    wanting = ~decoded.deleted
    wanting[decoded.vector_rows] = False
    return np.flatnonzero(wanting).tolist()


def vectors_of(
    decoded: Decoded, texts: Sequence[int], encoded: npt.NDArray[np.float32] | None, dim: int, metric: str
) -> npt.NDArray[np.float32]:
    """Vectors of the records that are no deletes, in order, float32 (v, dim); for cosine normalised.

    Parameters
    ----------
    texts : sequence of int, (t,)
        Positions of the records that were encoded.
    encoded : float32 (t, dim), optional
    """
    vectors = np.empty((len(decoded.ids), dim), dtype=np.float32)
    given = decoded.vectors
    if metric == "cosine" and len(given):
        given = given / np.linalg.norm(given, axis=1, keepdims=True)
    vectors[decoded.vector_rows] = given
    if encoded is not None:
        vectors[texts] = encoded
    return vectors[~decoded.deleted]
