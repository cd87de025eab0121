"""Attention maps of a batch, added up as they come: what the contact head needs of them, and none of them whole.

The head is linear in maps that are symmetrised, and corrected by the sums of their rows. So the weighted sum of all
maps, and the sums of rows and columns of each, say all. By kernels where there are any, else in plain steps.
"""

from functools import cache

import numpy as np
import torch

from virnucpro_cli.batch import QUERY_TILE, PackedBatch, query_tiles
from virnucpro_cli.model.attention import is_nvidia, kernels_refusal
from virnucpro_cli.plan.packing import SPECIAL_TOKENS

VALUES_AT_ONCE = 1 << 22
"""Values of maps that plain steps hold: some rows of all heads of a protein."""
LARGEST_DIFFERENCE = 1e-4
"""Relative L2 of sums by the kernels beside plain ones, in the trial; 1e-6 is usual."""


class Totals:
    """The sums of a batch of n proteins over layers and heads so far.

    weight: float32 [layers, H], of each map. total: float32 [V], the weighted sum [L, L] of each protein, one behind
    the other; margins: float32 [T, layers * H], of each map the sum of a residue's row and column.
    """

    def __init__(self, batch: PackedBatch, weight: torch.Tensor, is_fused: bool):
        self.batch, self.weight, self.is_fused, self.layer = batch, weight, is_fused, 0
        self.sizes = batch.seqlens - SPECIAL_TOKENS
        squares = self.sizes**2
        self.starts = np.cumsum(squares) - squares
        self.total = torch.zeros(int(squares.sum()), device=weight.device)
        self.margins = torch.zeros(len(batch.tokens), weight.numel(), device=weight.device)
        starts = np.repeat(self.starts, -(-batch.seqlens // QUERY_TILE))
        self.tile_starts = torch.from_numpy(starts).to(weight.device, non_blocking=True)

    def add(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        """Add the maps of the next layer, of queries and keys [T, H, Dh] of any dtype."""
        weight, column = self.weight[self.layer], self.layer * self.weight.shape[1]
        self.layer += 1
        if self.is_fused:
            from virnucpro_cli.model.kernels.contacts import Sums, add_maps

            if q.stride(0) != k.stride(0):
                q, k = q.contiguous(), k.contiguous()
            sums = Sums(self.total, self.tile_starts, self.margins, column)
            add_maps(q, k, self.batch.query_tiles, self.batch.max_seqlen, scale, weight, sums)
            return
        first = 0
        for size, start in zip(self.sizes.tolist(), self.starts.tolist(), strict=True):
            rows = slice(first, first + size + SPECIAL_TOKENS)
            margins = self.margins[first + 1 : first + 1 + size, column : column + len(weight)]
            add_plain(
                q[rows], k[rows], scale, weight, self.total[start : start + size * size].view(size, size), margins
            )
            first = rows.stop

    def probabilities(self, bias: torch.Tensor | float) -> torch.Tensor:
        """float32 [V]: the regression's [L, L] of each protein; symmetric to the bit.

        Each map is computed in memory of its own: on a CPU the bits of a sigmoid, or of a product, depend on where a
        value stands.
        """
        weight, first, found = self.weight.reshape(-1), 1, torch.empty_like(self.total)
        for size, start in zip(self.sizes.tolist(), self.starts.tolist(), strict=True):
            part = slice(start, start + size * size)
            total, margins = self.total[part].view(size, size), self.margins[first : first + size].clone()
            product = (margins * (weight / margins.sum(0))) @ margins.T  # average product correction
            own = torch.sigmoid(total + total.T - (product + product.T) / 2 + bias)
            torch.maximum(own, own.T, out=found[part].view(size, size))
            first += size + SPECIAL_TOKENS
        return found


def add_plain(
    q: torch.Tensor, k: torch.Tensor, scale: float, weight: torch.Tensor, total: torch.Tensor, margins: torch.Tensor
) -> None:
    """Add the maps of a layer of one protein; the twin of `kernels.contacts.add_maps`.

    q, k: [L + 2, H, Dh]; weight: float32 [H]; total: float32 [L, L]; margins: float32 [L, H].
    """
    q, k = (each.transpose(0, 1).contiguous().float() for each in (q, k))  # [H, L + 2, Dh]
    heads, size = len(weight), len(total)
    step = max(1, VALUES_AT_ONCE // (heads * (size + SPECIAL_TOKENS)))
    for at in range(0, size, step):
        queries = q[:, 1 + at : 1 + min(at + step, size)]
        maps = torch.softmax(queries @ k.transpose(1, 2) * scale, dim=-1)[:, :, 1:-1]
        total[at : at + step] += torch.einsum("h,hij->ij", weight, maps)
        margins[at : at + step] += maps.sum(2).T
        margins += maps.sum(1).T


@cache
def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device, after a trial; None if they can."""
    if not is_nvidia(device):
        return "they need an NVIDIA GPU"

    def try_out() -> None:
        with torch.cuda.device(device), torch.inference_mode():
            _try_out(device)

    return kernels_refusal(try_out)


def _try_out(device: torch.device) -> None:
    """Two layers of two proteins by the kernels and in plain steps. Raises RuntimeError if they differ."""
    noise = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(160, 3, 24, device=device, generator=noise) for _ in range(2))
    cu_seqlens = np.array([0, 70, 160])
    tiles = torch.from_numpy(query_tiles(cu_seqlens)).int().to(device)
    nothing = torch.zeros(160, dtype=torch.int32, device=device)
    batch = PackedBatch(nothing, nothing, nothing, nothing, tiles, None, None, np.arange(2), np.diff(cu_seqlens), 90)
    weight = torch.randn(2, 3, device=device, generator=noise)
    found = []
    for is_fused in (True, False):
        totals = Totals(batch, weight, is_fused)
        for layer in range(2):
            totals.add(q, k.roll(layer, 0), 24**-0.5)
        found.append((totals.total, totals.margins))
    for ours, twin in zip(*found, strict=True):
        if not (ours - twin).norm() <= LARGEST_DIFFERENCE * twin.norm():
            raise RuntimeError("sums of attention maps differ from their plain twins")
