"""Hidden rows of a packed batch to what is stored: pooled and residue rows, accumulated in float64 on the device.

Every sum is over one segment's rows alone, in an order of its own: its bits do not depend on what else is in the pack.
"""

from functools import cache

import torch

from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.model.attention import is_nvidia, kernels_refusal, sm80_refusal


def mean(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean over the residues of each segment (no `<cls>`, no `<eos>`), float32 [n, D]; a window's weighted share."""
    rows = hidden if batch.weights is None else hidden.float() * batch.weights[:, None]
    return mean_over_residues(rows, batch).float()


def mean_of_all(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean over all tokens of each segment, the first and the last included, float32 [n, D]. Not of windows."""
    offsets = batch.cu_seqlens
    return (_sums(hidden, batch, 0) / (offsets[1:] - offsets[:-1])[:, None]).float()


def bos(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The `<cls>` row of each segment, float32 [n, D]."""
    return hidden.index_select(0, batch.cu_seqlens[:-1]).float()


def eos(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The `<eos>` row of each segment, float32 [n, D]."""
    return hidden.index_select(0, batch.cu_seqlens[1:] - 1).float()


def maximum(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The largest value of each channel over the residues of each segment, float32 [n, D]. Not of windows."""
    return _over_residues("max", hidden.float(), batch)


def deviation(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Population standard deviation over each segment's residues, float32 [n, D], in two passes. Not of windows."""
    wide = _wide(hidden)
    mean = mean_over_residues(wide, batch)
    rows = torch.arange(len(hidden), dtype=batch.cu_seqlens.dtype, device=hidden.device)
    owner = torch.bucketize(rows, batch.cu_seqlens[1:-1], right=True)  # of filler, the last segment: it is in no sum
    centred = mean.index_select(0, owner).sub_(wide).square_()
    return mean_over_residues(centred, batch).sqrt().float()


POOLS = {"mean": mean, "mean-all": mean_of_all, "bos": bos, "eos": eos, "max": maximum, "std": deviation}


def residues(hidden: torch.Tensor, batch: PackedBatch, store_dtype: torch.dtype) -> torch.Tensor:
    """All rows [T, D] in the store dtype. Rows of windows are float32 and weighted, to be added up on the host."""
    if batch.weights is None:
        return hidden.to(store_dtype, copy=True)  # the next layer overwrites hidden
    return hidden.float() * batch.weights[:, None]


def mean_over_residues(rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean of rows [T, m] over the residues of each segment, accumulated in float64: [n, m]."""
    return _sums(rows, batch, 1) / batch.divisor[:, None]


def _sums(rows: torch.Tensor, batch: PackedBatch, skip: int) -> torch.Tensor:
    """Sums of rows [T, m] over each segment without its first and last `skip` (0 or 1) rows, in float64: [n, m]."""
    if rows.dtype in (torch.float16, torch.bfloat16) and rows.is_contiguous() and _kernel_works(rows.device):
        from virnucpro_cli.model.kernels.sums import segment_sums

        return segment_sums(rows, batch.cu_seqlens, skip)
    if skip:
        return _over_residues("sum", _wide(rows), batch)
    return torch.segment_reduce(_wide(rows), "sum", offsets=batch.cu_seqlens, axis=0, unsafe=True)


@cache
def _kernel_works(device: torch.device) -> bool:
    """Whether Triton adds rows up there, seen by a trial."""
    if not is_nvidia(device) or sm80_refusal(device, torch.float16) is not None:
        return False

    def try_out() -> None:
        from virnucpro_cli.model.kernels.sums import segment_sums

        bounds = torch.tensor([0, 3, 70], device=device, dtype=torch.int32)
        found = segment_sums(torch.arange(210, device=device).half().view(70, 3), bounds, 1)
        if found.tolist() != [[3.0, 4.0, 5.0], [7020.0, 7085.0, 7150.0]]:
            raise RuntimeError("sums of segments are wrong")

    return kernels_refusal(try_out) is None


def _over_residues(reduction: str, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    # Offsets alternate residues with the <eos><cls> between two segments; every second sum is kept.
    bounds = torch.stack((batch.cu_seqlens[:-1] + 1, batch.cu_seqlens[1:] - 1), dim=1).flatten()
    return torch.segment_reduce(rows, reduction, offsets=bounds, axis=0, unsafe=True)[::2]


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """Rows in float64, which Apple GPUs lack: a float32 sum of row after row would err more than the forward."""
    return rows.float() if rows.device.type == "mps" else rows.double()


class Pooler:
    """Collects the pools of each layer as the forward passes it; nothing of a layer outlives the call."""

    def __init__(self, kinds: tuple[str, ...], store_dtype: torch.dtype):
        self.kinds, self.store_dtype = kinds, store_dtype

    def add(self, into: Embeddings, layer: int, hidden: torch.Tensor, batch: PackedBatch) -> None:
        """Put the pools of a layer's rows [T, D] of any dtype into the embeddings."""
        for kind, pool in POOLS.items():
            if kind in self.kinds:
                rows = pool(hidden, batch)
                into.pooled[kind, layer] = rows
                self._note_finite(into, rows.to(self.store_dtype).isfinite().all(dim=1))
        if "residue" in self.kinds:
            self._keep(into, layer, residues(hidden, batch, self.store_dtype), batch)

    def _keep(self, into: Embeddings, name: int | str, rows: torch.Tensor, batch: PackedBatch) -> None:
        into.residue[name] = rows
        broken = ~rows.to(self.store_dtype).isfinite().all(dim=1, keepdim=True)
        self._note_finite(into, _over_residues("sum", broken.float(), batch)[:, 0] == 0)

    @staticmethod
    def _note_finite(into: Embeddings, finite: torch.Tensor) -> None:
        into.finite = finite if into.finite is None else into.finite & finite
