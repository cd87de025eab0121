"""Ways to batch a workload, through the same model code: packed; padded as scripts do it, in file order or sorted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.benchmark.workload import Workload
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan, first_fit_decreasing

Int64 = NDArray[np.int64]
FILE_ORDER, SORTED = "padded, file order", "padded, sorted by length"


@dataclass(frozen=True)
class Mode:
    """One way through a workload. run() computes the mean of the last layer of every record, batches already on the
    device, and returns them in record order, float32 [n, D], when all is done.
    """

    name: str
    batches: int
    rows: int  # computed
    used: int  # that belong to a record
    run: Callable[[], torch.Tensor]

    @property
    def density(self) -> float:
        return self.used / self.rows


Packed = tuple[Mode, Plan, VarlenCollator, list[PackedBatch]]
"""A way, the plan of its packs, what collates them, and the batches on the host."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def packed(model: PackedModel, workload: Workload, token_budget: int) -> Packed:
    """Packed batches, with what made them."""
    plan = first_fit_decreasing(workload.segments.length, token_budget)
    embedded = np.zeros(len(workload.table), np.int32)
    embedded[workload.segments.record] = workload.segments.length
    collate = VarlenCollator(workload.table, workload.segments, embedded, plan, pin=model.device.type == "cuda")
    host = [collate(pack) for pack in range(len(plan))]
    batches = [batch.to(model.device) for batch in host]
    order = torch.from_numpy(np.argsort(plan.segments)).to(model.device)

    def run() -> torch.Tensor:
        rows = torch.cat([mean_of_last(model, batch) for batch in batches])[order]
        synchronize(model.device)
        return rows

    mode = Mode(f"packed, budget {token_budget:,}", len(plan), int(plan.bucket.sum()), int(plan.tokens.sum()), run)
    return mode, plan, collate, host


def mean_of_last(model: PackedModel, batch: PackedBatch) -> torch.Tensor:
    """Means of the last layer, float16 [n, D] on the device."""
    last = model.spec.layers
    return model.embed(batch, (last,), Pooler(("mean",), torch.float16)).pooled["mean", last]


def padded(model: PackedModel, workload: Workload, token_budget: int, by_length: bool) -> Mode:
    """Padded batches. In file order: as many records a batch as make the padded tokens of a batch average at most the
    budget. Sorted by length: as many as fit the budget.
    """
    sizes = workload.sizes
    groups = sorted_groups(sizes, token_budget) if by_length else file_order_groups(sizes, token_budget)
    texts = workload.token_ids()
    batches = [_PaddedBatch.of(group, sizes, texts, model.device, workload.table.reading) for group in groups]
    order = torch.from_numpy(np.argsort(np.concatenate(groups))).to(model.device)

    def run() -> torch.Tensor:
        means: list[torch.Tensor] = []
        for batch in batches:

            def keep(layer: int, hidden: torch.Tensor, batch: _PaddedBatch = batch) -> None:
                means.append(batch.mean(hidden))

            model.with_attention(batch.attention).forward(batch.flat, (model.spec.layers,), keep)
        rows = torch.cat(means)[order]
        synchronize(model.device)
        return rows

    rows = sum(len(group) * int(sizes[group].max()) for group in groups)
    return Mode(SORTED if by_length else FILE_ORDER, len(groups), rows, int(sizes.sum()), run)


def file_order_groups(sizes: Int64, token_budget: int) -> list[Int64]:
    """Batches of one size in file order, the largest size whose padded tokens average at most the budget.

    sizes: int64 [n], tokens of each record; each batch: int64 [B], records.
    """
    best = 1
    for count in range(1, len(sizes) + 1):
        starts = np.arange(0, len(sizes), count)
        widest, sizes_of = np.maximum.reduceat(sizes, starts), np.diff(np.append(starts, len(sizes)))
        if (widest * sizes_of).mean() > token_budget:
            break
        best = count
    return np.split(np.arange(len(sizes)), np.arange(best, len(sizes), best))


def sorted_groups(sizes: Int64, token_budget: int) -> list[Int64]:
    """Batches in falling order of length, each of as many records as fit the budget when padded to its first.

    sizes: int64 [n], tokens of each record; each batch: int64 [B], records.
    """
    order = np.argsort(-sizes, kind="stable")
    groups, at = [], 0
    while at < len(order):
        count = max(token_budget // int(sizes[order[at]]), 1)
        groups.append(order[at : at + count])
        at += count
    return groups


@dataclass(frozen=True)
class _PaddedBatch:
    """B records padded to L tokens, as the flat rows that the model's forward takes."""

    flat: PackedBatch
    shape: tuple[int, int]
    mask: torch.Tensor | None  # bool [B, 1, 1, L], None if nothing is padded
    residues: torch.Tensor  # float32 [B, L, 1], 1 / residues at residues, else 0

    @staticmethod
    def of(group: Int64, sizes: Int64, texts: list[bytes], device: torch.device, reading: Reading) -> "_PaddedBatch":
        rows = [torch.tensor([reading.cls, *texts[record], reading.eos]) for record in group.tolist()]
        tokens = pad_sequence(rows, batch_first=True, padding_value=reading.pad).int().to(device)
        width, size = tokens.shape[1], torch.from_numpy(sizes[group])[:, None].to(device)
        place = torch.arange(width, device=device, dtype=torch.int32)
        lengths = np.full(len(group), width)
        flat = PackedBatch(
            tokens.flatten(), place.repeat(len(group)),
            torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(device),
            torch.ones(len(group), device=device), torch.empty(0, 3, dtype=torch.int32, device=device),
            None, None, group, lengths, width,
        )  # fmt: skip
        real, inside = tokens != reading.pad, (place > 0) & (place < size - 1)
        mask = None if bool(real.all()) else real[:, None, None, :]
        return _PaddedBatch(flat, (len(group), width), mask, (inside / (size - SPECIAL_TOKENS))[..., None])

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float, *left: torch.Tensor
    ) -> torch.Tensor:
        """PyTorch's scaled dot-product attention with a key mask, as padded scripts call it; [T, H, Dh] of a dtype.

        left: float32 [T] each, by which q and k are still to be multiplied, if the steps leave something.
        """
        for rows, each in zip((q, k), left, strict=False):
            rows.mul_(each[:, None, None])
        qs, ks, vs = (x.unflatten(0, self.shape).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=self.mask, scale=scale)
        return mixed.transpose(1, 2).flatten(0, 1).contiguous()

    def mean(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mean over residues, float32 [B, D], of hidden rows [B * L, D]."""
        return (hidden.unflatten(0, self.shape).float() * self.residues).sum(1)
