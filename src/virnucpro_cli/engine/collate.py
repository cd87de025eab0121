"""Host side of a pack: the text of its segments to one `PackedBatch`, the only batch format there is."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Int64, Plan, Segments, bucket_of, window_weights
from virnucpro_cli.texts import ranges

Item = int | np.int64 | Int64
"""A pack by its number in the plan, or segments that make up one."""


class Texts(Protocol):
    """Where a collator reads: a RecordTable, or what stands for one elsewhere."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Tokens of each record, int32 [N], without the first and the last."""

    @property
    def reading(self) -> Reading: ...

    def check_unchanged(self) -> None: ...
    def tokens(self, records: Int64, /) -> NDArray[Any]:
        """Tokens of the records, one behind the other, uint8 or uint16 [tokens of all]."""


class VarlenCollator:
    """Makes the batch of any pack of a plan.

    embedded: int32 [N], residues of each record that are embedded; a segment shorter than that is a window.
    """

    def __init__(self, table: Texts, segments: Segments, embedded: NDArray[np.int32], plan: Plan, pin: bool = False):
        self.table, self.segments, self.embedded, self.plan, self.pin = table, segments, embedded, plan, pin

    def __call__(self, item: Item) -> PackedBatch:
        """The batch of a pack, or of any segments."""
        self.table.check_unchanged()
        numbers = self.segments_of(item)
        record = self.segments.record[numbers].astype(np.int64)
        length = self.segments.length[numbers].astype(np.int64)
        total = self.embedded[record]
        seqlens = length + SPECIAL_TOKENS
        cu_seqlens = np.append(0, np.cumsum(seqlens))
        used = int(cu_seqlens[-1])
        rows = int(bucket_of(cu_seqlens[-1:], self.plan.token_budget)[0])
        position = np.arange(used, dtype=np.int32)
        position -= np.repeat(cu_seqlens[:-1].astype(np.int32), seqlens)
        reading = self.table.reading
        is_whole = (length == self.table.sizes[record]).all()
        text = self.table.tokens(record) if is_whole else self._of_pieces(record, numbers, length)
        text = _between(text, cu_seqlens, reading.cls, reading.eos)

        mask_ratio = weights = None
        if reading.scales_masks and (text == reading.mask).any():
            masked = np.add.reduceat(text == reading.mask, cu_seqlens[:-1], dtype=np.int64)
            ratio = np.float32(1) - (masked / seqlens).astype(np.float32)
            mask_ratio = self._tensor(np.repeat(ratio, seqlens), torch.float32, rows, filler=1)
        windows = np.flatnonzero(length < total)
        if len(windows):
            blending = np.ones(used, np.float32)
            for i in windows.tolist():
                blending[cu_seqlens[i] + 1 : cu_seqlens[i + 1] - 1] = self.weights_of(int(numbers[i]))
            weights = self._tensor(blending, torch.float32, rows, filler=1)
        return PackedBatch(
            self._tensor(text, torch.int32, rows, filler=reading.pad), self._tensor(position, torch.int32, rows),
            self._tensor(cu_seqlens, torch.int32), self._tensor(total, torch.float32),
            self._tensor(query_tiles(cu_seqlens).ravel(), torch.int32).view(-1, 3),
            mask_ratio, weights, numbers, seqlens, int(seqlens.max()),
        )  # fmt: skip

    def _of_pieces(self, record: Int64, numbers: Int64, length: Int64) -> NDArray[Any]:
        """Tokens of segments, one behind the other. record, numbers, length: int64 [n]; windows share their record."""
        whole, which = np.unique(record, return_inverse=True)
        sizes = self.table.sizes[whole].astype(np.int64)
        first = (np.cumsum(sizes) - sizes)[which] + self.segments.start[numbers]
        return self.table.tokens(whole)[ranges(first, length)]

    def parts(self, item: Item, tokens: int) -> list[Any]:
        """The segments of a pack in parts of at most so many tokens, or of one segment; the item if it is one part."""
        numbers = self.segments_of(item)
        ends = np.cumsum(self.segments.length[numbers].astype(np.int64) + SPECIAL_TOKENS)
        parts, first = [], 0
        while first < len(numbers):
            before = int(ends[first - 1]) if first else 0
            upto = max(first + 1, int(np.searchsorted(ends, before + tokens, side="right")))
            parts.append(numbers[first:upto])
            first = upto
        return parts if len(parts) > 1 else [item]

    def segments_of(self, item: Item) -> Int64:
        """Numbers of the segments of an item, int64 [n]."""
        return item if isinstance(item, np.ndarray) else self.plan.pack(int(item))

    def weights_of(self, segment: int) -> NDArray[np.float32]:
        """Blending weights of a window, float32 [length]."""
        record = int(self.segments.record[segment])
        every = self.segments.of(record)
        starts = tuple(self.segments.start[every.start : every.stop].tolist())
        window = int(self.segments.length[segment])
        return window_weights(int(self.embedded[record]), starts, window)[segment - every.start]

    def _tensor(self, values: NDArray[Any], dtype: torch.dtype, rows: int = 0, filler: int = 0) -> torch.Tensor:
        """The values, and filler up to so many rows, in a tensor from which a copy to a device need not wait."""
        rows = rows or len(values)
        try:
            tensor = torch.empty(rows, dtype=dtype, pin_memory=self.pin)
        except RuntimeError:  # no pinned memory is left
            tensor = torch.empty(rows, dtype=dtype)
        tensor.numpy()[: len(values)] = values
        tensor.numpy()[len(values) :] = filler
        return tensor


def _between(text: NDArray[Any], cu_seqlens: Int64, first: int, last: int) -> NDArray[Any]:
    """Tokens of all segments, one behind the other, each with a first and a last one around it: [cu_seqlens[-1]]."""
    found, inside = np.empty(cu_seqlens[-1], text.dtype), np.ones(cu_seqlens[-1], np.bool_)
    for at, token in ((cu_seqlens[:-1], first), (cu_seqlens[1:] - 1, last)):
        found[at] = token
        inside[at] = False
    found[inside] = text
    return found
