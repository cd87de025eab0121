"""Host side of a pack: the text of its segments to one `PackedBatch`, the only batch format there is."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import alphabet
from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan, Segments, bucket_of, window_weights

Item = int | np.int64 | NDArray[np.int64]
"""A pack by its number in the plan, or segments that make up one."""


class Texts(Protocol):
    """Where a collator reads: a RecordTable, or what stands for one elsewhere."""

    @property
    def length(self) -> NDArray[np.int32]: ...
    def check_unchanged(self) -> None: ...
    def tokens(self, records: NDArray[np.int64], /) -> NDArray[np.uint8]: ...


class VarlenCollator:
    """Makes the batch of any pack of a plan.

    embedded: int [N], residues of each record that are embedded; a segment shorter than that is a window.
    """

    def __init__(self, table: Texts, segments: Segments, embedded: NDArray[np.int32], plan: Plan, pin: bool = False):
        self.table, self.segments, self.embedded, self.plan, self.pin = table, segments, embedded, plan, pin

    def __call__(self, item: Item) -> PackedBatch:
        """The batch of a pack, or of any segments."""
        self.table.check_unchanged()
        numbers = self.segments_of(item)
        record = self.segments.record[numbers]
        length = self.segments.length[numbers].astype(np.int64)
        seqlens = length + SPECIAL_TOKENS
        cu_seqlens = np.append(0, np.cumsum(seqlens))
        used = int(cu_seqlens[-1])
        rows = int(bucket_of(cu_seqlens[-1:], self.plan.token_budget)[0])
        total = self.embedded[record]

        position = np.arange(used) - np.repeat(cu_seqlens[:-1], seqlens)
        positions = self._tensor(rows, torch.int32)
        positions.numpy()[:used] = position
        positions.numpy()[used:] = 0

        whole, which = np.unique(record, return_inverse=True)  # windows share their record
        sizes = self.table.length[whole].astype(np.int64)
        first = (np.cumsum(sizes) - sizes)[which] + self.segments.start[numbers]  # of each segment, in the text of all
        text = self.table.tokens(whole).take(position + np.repeat(first - 1, seqlens), mode="clip")
        text[cu_seqlens[:-1]] = alphabet.CLS
        text[cu_seqlens[1:] - 1] = alphabet.EOS
        tokens = self._tensor(rows, torch.int32)
        tokens.numpy()[:used] = text
        tokens.numpy()[used:] = alphabet.PAD
        bounds = self._tensor(len(cu_seqlens), torch.int32)
        bounds.numpy()[:] = cu_seqlens
        divisor = self._tensor(len(numbers), torch.float32)
        divisor.numpy()[:] = total

        parts = query_tiles(cu_seqlens)
        tiles = self._tensor(3 * len(parts), torch.int32).view(-1, 3)
        tiles.numpy()[:] = parts

        mask_ratio = None
        if (text == alphabet.MASK).any():
            masked = np.add.reduceat(text == alphabet.MASK, cu_seqlens[:-1], dtype=np.int64)
            mask_ratio = self._tensor(rows, torch.float32)
            mask_ratio.numpy()[:used] = np.repeat(np.float32(1) - (masked / seqlens).astype(np.float32), seqlens)
            mask_ratio.numpy()[used:] = 1

        weights = None
        windows = np.flatnonzero(length < total)
        if len(windows):
            weights = self._tensor(rows, torch.float32)
            weights.numpy()[:] = 1
            for i in windows.tolist():
                weights.numpy()[cu_seqlens[i] + 1 : cu_seqlens[i + 1] - 1] = self.weights_of(int(numbers[i]))
        return PackedBatch(
            tokens, positions, bounds, divisor, tiles, mask_ratio, weights, numbers, seqlens, int(seqlens.max())
        )

    def parts(self, item: Item, tokens: int) -> list[Any]:
        """The segments of a pack in parts of at most so many tokens, or of one segment; the item itself if it is one part."""
        numbers = self.segments_of(item)
        ends = np.cumsum(self.segments.length[numbers].astype(np.int64) + SPECIAL_TOKENS)
        parts, first = [], 0
        while first < len(numbers):
            before = int(ends[first - 1]) if first else 0
            upto = max(first + 1, int(np.searchsorted(ends, before + tokens, side="right")))
            parts.append(numbers[first:upto])
            first = upto
        return parts if len(parts) > 1 else [item]

    def segments_of(self, item: Item) -> NDArray[np.int64]:
        """Numbers of the segments of an item."""
        return item if isinstance(item, np.ndarray) else self.plan.pack(int(item))

    def weights_of(self, segment: int) -> NDArray[np.float32]:
        """Blending weights, float32 [length], of a window."""
        record = self.segments.record[segment]
        first, last = np.searchsorted(self.segments.record, [record, record + 1])
        starts = tuple(self.segments.start[first:last].tolist())
        window = int(self.segments.length[segment])
        return window_weights(int(self.embedded[record]), starts, window)[segment - int(first)]

    def _tensor(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        try:
            return torch.empty(rows, dtype=dtype, pin_memory=self.pin)
        except RuntimeError:  # so little that it need not be pinned
            return torch.empty(rows, dtype=dtype)
