"""The packed forward that every model family runs, of weights in the form that its steps take.

Shapes: T rows of a pack, H heads of Dh, D = H * Dh, L layers.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.model.attention import STEPS, Attention, Backend
from virnucpro_cli.model.plain import Layer, Pair, layer_norm
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.model.spec import ModelSpec, State, stream_dtype

OnLayer = Callable[[int, torch.Tensor], None]


class Parts(NamedTuple):
    """The weights of a forward, float32 on its device, as a family makes them of its state.

    embedding: [V, D], a row for each token. layers: one after the other, so that only one is there twice. norm: the
    last LayerNorm, or None. inv_freq: [Dh / 2], or None where nothing is rotated. positions: [P, D] or None, rows of
    learned positions, added to the embedding. first_norm: a LayerNorm of the embedding, or None.
    """

    embedding: torch.Tensor
    layers: Iterable[Layer]
    norm: Pair | None
    inv_freq: torch.Tensor | None
    positions: torch.Tensor | None = None
    first_norm: Pair | None = None


class PackedModel:
    """Weights on one device in one dtype, and the forward over packed batches.

    head_state: the tensors of the head for tokens, and the token embedding, by the names of the state.
    dtype: float32, 16 bit, or float8_e4m3fn: then most products are in e4m3 and the rest is in fp16.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Parts,
        head_state: State,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ):
        self.rows_of_a_part: int | None = None
        self.spec, self.dtype, self.device, self.backend = spec, dtype, device, backend
        self.head_state = head_state
        stream = torch.float32 if backend.wide else stream_dtype(dtype)
        self.embedding = parts.embedding.to(stream)
        self.positions = None if parts.positions is None else parts.positions.to(stream)
        self.first_norm = parts.first_norm
        self.layers, self.norm = backend.steps.prepare(parts.layers, parts.norm, spec.head_dim, dtype)
        self.inv_freq = parts.inv_freq
        self.cos = self.sin = torch.empty(0, spec.head_dim // 2, device=device)

    def compile(self) -> None:
        """Have a layer's kernels compiled beside each other: in the first pack one would wait for the other."""
        backend = self.backend
        if self.device.type != "cuda" or backend.name not in STEPS or backend.wide or self.inv_freq is None:
            return
        from virnucpro_cli.model.kernels.trial import ROWS, alone, side_by_side

        self.reserve_positions(1)
        x = self.embedding.new_zeros(ROWS, self.spec.hidden)
        turn = backend.steps.rotary(self.cos, self.sin, torch.zeros(ROWS, dtype=torch.int32, device=self.device))
        side_by_side(self.device, alone(backend.steps, x, self.layers[0], turn, self.norm))

    def reserve_positions(self, longest: int) -> None:
        """Make the rotary tables (fp32, whatever the dtype) cover segments of up to `longest` tokens."""
        if self.inv_freq is not None and longest > len(self.cos):
            angles = torch.outer(torch.arange(longest, device=self.device, dtype=torch.float32), self.inv_freq)
            self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        """Run the batch up to the last wanted layer, and call `on_layer(i, hidden [T, D])` for each wanted one.

        Layer 0 is the scaled embedding, i the residual stream after layer i; only the last has the final LayerNorm.
        `on_layer` must not keep `hidden`, which the next layer overwrites.
        """
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode():
            self._forward(batch, wanted, on_layer)

    def _forward(self, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        self.reserve_positions(batch.max_seqlen)
        x, used = self._embedded(batch), batch.used
        if 0 in wanted:
            on_layer(0, x)
        steps, scale = self.backend.steps, self.spec.head_dim**-0.5
        size = self.rows_of_a_part or len(x)
        parts = [slice(at, min(at + size, len(x))) for at in range(0, len(x), size)]
        rotary = [steps.rotary(self.cos, self.sin, batch.positions[part]) for part in parts]
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            thirds = (steps.query_key_value(x[part], layer, turn) for part, turn in zip(parts, rotary, strict=True))
            q, k, v, *left = _joined(thirds, parts)  # [T, H, Dh] each, and what is left of norms of q and k, [T] each
            mixed = self.backend.attention(q, k, v, batch, scale, *left)
            if used < len(mixed):
                mixed[used:] = 0  # filler: whatever the kernel left there
            steps.add_attention(x, mixed, layer)
            del q, k, v, left, mixed  # or they would stand beside the widest rows there are
            for part in parts:
                steps.add_inner(x[part], steps.inner(x[part], layer), layer)
            if number in wanted:
                last = number == self.spec.layers
                on_layer(number, steps.last_norm(x, self.norm) if last else steps.residual(x, layer))

    def _embedded(self, batch: PackedBatch) -> torch.Tensor:
        """Layer 0 of the batch, [T, D] in the dtype of the residual stream."""
        x = F.embedding(batch.tokens, self.embedding)
        if batch.mask_ratio is not None:
            x = (x.float() / batch.mask_ratio[:, None]).to(x.dtype)
        if self.positions is not None:
            x = x + F.embedding(batch.positions, self.positions)
        if self.first_norm is not None:
            x = layer_norm(x.float(), *self.first_norm).to(x.dtype)
        return x

    def embed(self, batch: PackedBatch, wanted: tuple[int, ...], pooler: Pooler) -> Embeddings:
        """The pools of each wanted layer of the batch."""
        embeddings = Embeddings()
        self.forward(batch, wanted, lambda layer, hidden: pooler.add(embeddings, layer, hidden, batch))
        return embeddings

    def with_attention(self, attention: Attention) -> "PackedModel":
        """The same weights and steps with another attention function."""
        return self._with(backend=self.backend._replace(attention=attention))

    def without_last_norm(self) -> "PackedModel":
        """The same, but the last layer gives the residual stream too."""
        steps = self.backend.steps
        bare = SimpleNamespace(**vars(steps))
        bare.last_norm = lambda x, norm: steps.residual(x, self.layers[-1])
        return self._with(backend=self.backend._replace(steps=bare))

    def in_parts(self, rows: int) -> "PackedModel":
        """The same, with the work around attention done on so many rows at a time: less memory, and the same bits."""
        return self._with(rows_of_a_part=rows)

    def _with(self, **changed: Any) -> "PackedModel":
        other = copy.copy(self)
        vars(other).update(changed)
        return other


def _joined(pieces: Iterator[tuple[torch.Tensor, ...]], parts: list[slice]) -> tuple[torch.Tensor, ...]:
    """Whole tensors of pieces that come one after the other, each the rows of a part; never two copies of all."""
    first = next(pieces)
    if len(parts) == 1:
        return first
    whole = tuple(each.new_empty(parts[-1].stop, *each.shape[1:]) for each in first)
    for part, piece in zip(parts, chain([first], pieces), strict=True):
        for into, each in zip(whole, piece, strict=True):
            into[part] = each
    return whole


def exact_arithmetic() -> None:
    """Turn off every reduced-precision shortcut of the BLAS: TF32, and 16-bit accumulation between split-K parts."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
