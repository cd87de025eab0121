"""The two nouns of the hot path: a `PackedBatch` goes into the forward, `Embeddings` come out."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.texts import ranges

QUERY_TILE = 64


def query_tiles(cu_seqlens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tiles of at most QUERY_TILE rows of one segment, int64 [m, 3].

    Columns: the tile's first row, the segment's first row, the row past its end. cu_seqlens: int64 [n + 1].
    """
    seqlens = np.diff(cu_seqlens)
    counts = -(-seqlens // QUERY_TILE)
    segment = np.repeat(np.arange(len(seqlens)), counts)
    within = ranges(np.zeros(len(counts), np.int64), counts)
    start = cu_seqlens[segment]
    return np.stack((start + within * QUERY_TILE, start, cu_seqlens[segment + 1]), axis=1)


@dataclass(frozen=True)
class PackedBatch:
    """n segments, each `<cls> residues <eos>`, one behind the other in T rows; rows past `cu_seqlens[-1]` are filler.

    Tensors: tokens int32 [T]; positions int32 [T], restarting at 0; cu_seqlens int32 [n + 1]; divisor float32 [n],
    residues that the mean divides by; query_tiles int32 [m, 3], see the function.
    mask_ratio: float32 [T], `1 - masked share` of each row's segment; None where no `<mask>` occurs.
    weights: float32 [T], blending weights; None where no window of a long record occurs.
    Host: segments int64 [n], their numbers; seqlens int64 [n], tokens of each; max_seqlen.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    divisor: torch.Tensor
    query_tiles: torch.Tensor
    mask_ratio: torch.Tensor | None
    weights: torch.Tensor | None
    segments: NDArray[np.int64]
    seqlens: NDArray[np.int64]
    max_seqlen: int

    @property
    def used(self) -> int:
        """Rows that belong to a segment; known on the host, so that reading it never waits for the device."""
        return int(self.seqlens.sum())

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`; asynchronous from pinned memory."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self, tokens=move(self.tokens), positions=move(self.positions), cu_seqlens=move(self.cu_seqlens),
            divisor=move(self.divisor), query_tiles=move(self.query_tiles), mask_ratio=move(self.mask_ratio),
            weights=move(self.weights),
        )  # fmt: skip


@dataclass
class Embeddings:
    """The rows of one batch of n segments in T rows.

    pooled: (kind, layer) -> float32 [n, D]; ("unmasked", score) -> float32 [n].
    residue: layer -> [T, D], "logits" -> [T, V], in the store dtype. Where the batch has windows: float32, already
    multiplied by the blending weights.
    finite: bool [n], whether everything stored of a segment is finite after the cast to the store dtype.
    """

    pooled: dict[tuple[str, Any], torch.Tensor] = field(default_factory=dict)
    residue: dict[Any, torch.Tensor] = field(default_factory=dict)
    finite: torch.Tensor | None = None
