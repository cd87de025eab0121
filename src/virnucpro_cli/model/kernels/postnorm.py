"""The forward's steps where LayerNorm comes after each sum and attention knows distances (ALiBi): DNABERT-S.

Products are PyTorch's. On NVIDIA GPUs in 16 bit, what is around them is one pass each in Triton: the sum with its
LayerNorm, and the gate; elsewhere it is plain PyTorch, the twin of that. Shapes as in `plain`.
"""

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model import plain
from virnucpro_cli.model.attention import Backend, is_nvidia, kernels_refusal, sm80_refusal
from virnucpro_cli.model.dnabert import EPS
from virnucpro_cli.model.plain import Layer, Pair
from virnucpro_cli.model.spec import ModelSpec

KNOWING = ("triton", "portable", "sdpa")
"""Backends whose attention can take distances off its scores, and is taken to compute them here."""

MOST_BIAS = 1 << 26
"""Numbers of a bias [H, queries, L] at most, unless one query has more."""


def slopes(heads: int) -> list[float]:
    """How much a head's score falls with each token of distance: 2^(-8 k / P), k from 1, for P heads.

    P is the largest power of two; of further heads, every other one of 2 P heads, from the first. Press et al. 2022.
    """
    power = 1 << (heads.bit_length() - 1)

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * k / count) for k in range(1, count + 1)]

    return geometric(power) + geometric(2 * power)[::2][: heads - power]


def adapted(backend: Backend, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Backend:
    """The same backend with the steps here, and attention that knows distances. Its notes are those of this change.

    Our kernels compute it where they can, whatever the backend, and PyTorch's scaled dot-product attention elsewhere.
    """
    fall = torch.tensor(slopes(spec.heads), device=device)
    refusal: str | None = "it has no Triton kernels"
    if backend.wide:
        refusal = "its residual stream is in float32"
    elif is_nvidia(device):
        refusal = sm80_refusal(device, dtype) or kernels_refusal(partial(try_out, device, dtype))
    if refusal is not None:
        notes = (f"{spec.name}: attention by sdpa, a call for each sequence: {refusal}",) if is_nvidia(device) else ()
        return backend._replace(attention=partial(by_sdpa, slopes=fall), steps=steps(False), notes=notes)
    notes = ()
    if backend.name not in KNOWING:
        notes = (f"{spec.name}: attention by our own kernel, since {backend.name} knows no distances",)
    attend = partial(by_kernel, slopes=fall)
    return backend._replace(attention=attend, steps=steps(True), notes=notes)


def steps(kernels: bool) -> Any:
    """The functions of a forward's steps. kernels: whether Triton has the sums and the gate."""
    if not kernels:
        add, gate = add_norm, gated
    else:
        from virnucpro_cli.model.kernels import glue

        add, gate = glue.add_norm, glue.gated

    def add_attention(x: torch.Tensor, mixed: torch.Tensor, layer: Layer) -> None:
        """x [T, D] = LayerNorm(x + the output projection of attention's result [T, H, Dh]), in the dtype of x."""
        add(x, F.linear(mixed.reshape(x.shape), *layer.out), layer.norm1, EPS)

    def inner(x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """x [T, D] to gelu(a) b [T, F] of its projection a beside b, in the layer's dtype."""
        return gate(F.linear(x.to(layer.fc1[0].dtype), layer.fc1[0]))

    def add_inner(x: torch.Tensor, inner: torch.Tensor, layer: Layer) -> None:
        """x [T, D] = LayerNorm(x + fc2(inner [T, F])), in the dtype of x."""
        add(x, F.linear(inner, *layer.fc2), layer.norm2, EPS)

    return SimpleNamespace(
        __name__=f"{__name__}.{'glue' if kernels else 'plain'}", prepare=prepare, rotary=no_rotary,
        query_key_value=query_key_value, add_attention=add_attention, inner=inner, add_inner=add_inner,
        residual=as_it_is, last_norm=as_it_is,
    )  # fmt: skip


def prepare(layers: Iterable[Layer], norm: Pair, head_dim: int, dtype: torch.dtype) -> tuple[list[Layer], Any]:
    """Layers in the dtype, with norms in float32, and no last norm."""

    def cast(pair: Pair) -> Pair:
        return pair[0].to(dtype), pair[1].to(dtype)

    return [
        layer._replace(qkv=cast(layer.qkv), out=cast(layer.out), fc1=cast(layer.fc1), fc2=cast(layer.fc2))
        for layer in layers
    ], None


def no_rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> int:
    """Width of a head: all that is used of tables [L, Dh / 2], float32."""
    return 2 * cos.shape[1]


def query_key_value(x: torch.Tensor, layer: Layer, head_dim: int) -> tuple[torch.Tensor, ...]:
    """The stream x [T, D] to q, k, v [T, H, Dh], in the layer's dtype."""
    qkv = F.linear(x.to(layer.qkv[0].dtype), *layer.qkv)
    return tuple(each.unflatten(1, (-1, head_dim)) for each in qkv.chunk(3, dim=1))


def as_it_is(x: torch.Tensor, _: Any) -> torch.Tensor:
    """The stream x [T, D] of any dtype, which has its LayerNorm."""
    return x


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: Pair, eps: float) -> None:
    """x [T, D] = LayerNorm(x + y [T, D]) in float32, rounded to the dtype of x."""
    x.copy_(F.layer_norm(x.float() + y.float(), norm[0].shape, *norm, eps=eps))


def gated(x: torch.Tensor) -> torch.Tensor:
    """gelu(a) b [T, F] of x [T, 2 F], which is a beside b, in its dtype. May overwrite x."""
    gate, up = x.chunk(2, dim=-1)
    return plain.gelu(gate.contiguous()).mul_(up)


# --- attention -------------------------------------------------------------------------------------------------------


def by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float, *, slopes: torch.Tensor
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], float16 or bf16; slopes: float32 [H]."""
    from virnucpro_cli.model.kernels.attention import attention

    return attention(q, k, v, batch.query_tiles, scale, slopes=slopes)


def by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float, *, slopes: torch.Tensor
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh] of their dtype; slopes: float32 [H].

    There is a call per segment, since the number of equally long neighbours may choose its kernel; each is for some
    queries at a time, so that the bias takes little memory. In float32 on CUDA, PyTorch's fused kernel errs by
    1.3 to 1.8 times as much as plain products and a softmax, which are taken there.
    """
    out, at, exact = torch.empty_like(q), 0, q.device.type == "cuda" and q.dtype == torch.float32
    known: dict[int, torch.Tensor] = {}
    for length in batch.seqlens.tolist():
        rows, size = slice(at, at + length), max(1, MOST_BIAS // (len(slopes) * length))
        qs, ks, vs = (x[rows].transpose(0, 1)[None] for x in (q, k, v))  # [1, H, length, Dh]
        for first in range(0, length, size):
            if size < length or length not in known:
                place = torch.arange(length, device=q.device)
                known = {length: _bias(slopes, place[first : first + size], place).to(q.dtype)}
            some, bias = qs[:, :, first : first + size], known[length]
            if exact:
                mixed = torch.baddbmm(bias, some[0], ks[0].mT, alpha=scale).softmax(-1) @ vs[0]
            else:
                mixed = F.scaled_dot_product_attention(some, ks, vs, scale=scale, attn_mask=bias)[0]
            out[rows][first : first + size] = mixed.transpose(0, 1)
        at += length
    return out


def _bias(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The bias of distances, added to scores: float32 [H, queries, keys]."""
    return -slopes[:, None, None] * (queries[:, None] - keys).abs()


# --- trial -----------------------------------------------------------------------------------------------------------


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels, and compare each with its twin. Raises RuntimeError if one differs."""
    from virnucpro_cli.model.kernels.attention import attention
    from virnucpro_cli.model.kernels.trial import ROWS, SCALE, Noise, must_agree

    noise, fall = Noise(device), torch.tensor(slopes(2), device=device)
    with torch.cuda.device(device), torch.inference_mode():
        x, y, wide = noise(ROWS, 64), noise(ROWS, 64), noise(ROWS, 128, scale=1.0)
        norm, qkv = (noise(64, mean=1.0), noise(64)), [noise(ROWS, 2, 64, scale=1.0) for _ in range(3)]
        tiles = torch.tensor([[0, 0, ROWS]], device=device, dtype=torch.int32)
        q, k, v = (each.transpose(0, 1) for each in qkv)
        place = torch.arange(ROWS, device=device)
        twin = F.scaled_dot_product_attention(q, k, v, _bias(fall, place, place), scale=SCALE).transpose(0, 1)
        ours, twins = x.to(dtype, copy=True), x.clone()
        steps(True).add_attention(ours, y.to(dtype), _identity(norm, dtype))
        steps(False).add_attention(twins, y, _identity(norm, torch.float32))
        from virnucpro_cli.model.kernels import glue

        low_q, low_k, low_v = (each.to(dtype) for each in qkv)
        mixed = attention(low_q, low_k, low_v, tiles, SCALE, slopes=fall)
        found = {
            "attention": (mixed, twin),
            "add_norm": (ours, twins),
            "gated": (glue.gated(wide.to(dtype)), gated(wide.clone())),
        }
        for name, (each, exact) in found.items():
            must_agree(each, exact, dtype, f"{name} differs from its plain twin")


def _identity(norm: Pair, dtype: torch.dtype) -> Layer:
    """A layer whose output projection changes nothing."""
    width, device = len(norm[0]), norm[0].device
    pair = torch.eye(width, device=device, dtype=dtype), torch.zeros(width, device=device, dtype=dtype)
    return Layer(norm, pair, pair, norm, pair, pair)
