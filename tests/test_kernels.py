"""Every fused kernel against its plain PyTorch twin and against float64. Interpreted on the CPU; compiled on a GPU."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import interpreter
from conftest import TINY, relative_l2
from packs import embeddings, one_pack, random_protein
from test_attention import batch_of
from virnucpro_cli.benchmark import modes, workload
from virnucpro_cli.features.contacts import totals
from virnucpro_cli.model import plain, weights
from virnucpro_cli.model.attention import Backend, sdpa, triton
from virnucpro_cli.model.attention import portable as portable_attention
from virnucpro_cli.model.families import build, family_of
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import SPECIAL_TOKENS

pytest.importorskip(
    "triton", None if torch.cuda.is_available() else interpreter.OLDEST, reason="the interpreter needs triton>=3.9"
)
from virnucpro_cli.model.kernels import attention, e4m3, fused, linear, norm, portable
from virnucpro_cli.model.kernels.sums import segment_sums

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
ROUNDING = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
MANY = 20 if ON_GPU else 12
"""Heads of which q fills several blocks of columns, and ends inside one. Interpreted, a size crosses an edge and no more."""
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def data(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (values * scale).to(DEVICE, dtype)


def around(width: int) -> plain.Pair:
    """Weight and bias of a LayerNorm, float32."""
    return data(width, dtype=torch.float32, scale=0.3, seed=6) + 1, data(width, dtype=torch.float32, scale=0.3, seed=7)


def dense(columns: int, depth: int) -> plain.Pair:
    """Weight and bias of a linear layer, float32."""
    weight = data(columns, depth, dtype=torch.float32, scale=depth**-0.5, seed=1)
    return weight, data(columns, dtype=torch.float32, seed=2)


def exact_linear(x: torch.Tensor, offset: torch.Tensor, norm: plain.Pair, linear: plain.Pair) -> torch.Tensor:
    """linear(LayerNorm(x + offset)) in float64."""
    weight, bias = (each.double() for each in norm)
    normed = torch.nn.functional.layer_norm(x.double() + offset.double(), weight.shape, weight, bias, 1e-5)
    return torch.nn.functional.linear(normed, *(each.double() for each in linear))


def gated(inner: int, width: int, heads: int, seed: int = 0) -> plain.Layer:
    """A layer with norms of q and k and SwiGLU, float32; their weights are small, large and negative."""
    gains = tuple(data(width, dtype=torch.float32, scale=2, seed=seed + each) for each in (8, 9))
    norm, up = around(width), dense(2 * inner, width)
    return plain.Layer(norm, dense(3 * width, width), dense(width, width), norm, up, dense(width, inner), gains, True)


def prepared(layer: plain.Layer, head_dim: int, dtype: torch.dtype) -> fused.Layer:
    return fused.prepare([layer], layer.norm1, head_dim, dtype)[0][0]


def untouched(weight: torch.Tensor, bias: torch.Tensor) -> linear.Folded:
    """A linear layer whose rows are scaled by their LayerNorm and nothing else."""
    shift, bias = linear.whole_tiles(torch.zeros_like(bias)), linear.whole_tiles(bias)
    return linear.Folded(torch.zeros_like(weight[0]).float(), weight, shift, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(5, 32), (130 if ON_GPU else 6, 320), (33 if ON_GPU else 3, 1280), (9, 480), (3, 5120)]
)
def test_norm_is_the_layer_norm_of_the_stream_and_its_offset(rows: int, width: int, dtype: torch.dtype) -> None:
    x, offset = data(rows, width, dtype=dtype), data(width, dtype=torch.float32, seed=1)
    weight, bias = around(width)
    wide = x.double() + offset.double()
    exact = torch.nn.functional.layer_norm(wide, (width,), weight.double(), bias.double(), 1e-5)
    assert relative_l2(norm.norm(x, offset, weight, bias), exact) <= ROUNDING[dtype]
    scale = norm.row_scale(x, offset)
    assert scale.dtype == torch.float32 and scale.shape == (rows,)
    assert relative_l2(scale, (wide.var(1, unbiased=False) + 1e-5).rsqrt()) <= 1e-6


def test_norms_keep_their_precision_when_one_channel_holds_the_energy() -> None:
    x, offset = data(8, 320, dtype=torch.float16), data(320, dtype=torch.float32, seed=1)
    x[:, 62] += 300
    ones, zeros = torch.ones_like(offset), torch.zeros_like(offset)
    exact = torch.nn.functional.layer_norm(x.double() + offset.double(), (320,), eps=1e-5)
    others = torch.arange(320, device=DEVICE) != 62
    assert relative_l2(norm.norm(x, offset, ones, zeros)[:, others], exact[:, others]) <= 4e-4
    weight, bias = dense(256, 320)
    weight[:, 62] *= 0.01  # as a trained layer does that reads the others
    folded = linear.fold((ones, zeros), (weight, bias), offset, torch.float16)
    exact = torch.nn.functional.gelu(exact_linear(x, offset, (ones, zeros), (weight, bias)))
    assert relative_l2(linear.gelu_linear(x, folded), exact) <= 6e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(128, 64, 256), (130, 80, 320), (1, 320, 1280), (200, 96, 24)])
def test_gelu_linear_is_gelu_of_the_linear_layer_of_the_norm(
    rows: int, depth: int, columns: int, dtype: torch.dtype
) -> None:
    x, offset = data(rows, depth, dtype=dtype), data(depth, dtype=torch.float32, scale=0.5, seed=1)
    parts = around(depth), dense(columns, depth)
    found = linear.gelu_linear(x, linear.fold(*parts, offset, dtype))
    exact = torch.nn.functional.gelu(exact_linear(x, offset, *parts))
    assert found.shape == (rows, columns) and found.dtype == dtype
    assert relative_l2(found, exact) <= 1.5 * ROUNDING[dtype]


def test_a_large_common_offset_of_all_channels_is_taken_out() -> None:
    """LayerNorm removes the mean of a row; the folded weights must as well."""
    x, parts = data(40, 64, dtype=torch.float16), (around(64), dense(256, 64))
    offset = torch.full((64,), 200.0, device=DEVICE)
    found = linear.gelu_linear(x, linear.fold(*parts, offset, torch.float16))
    assert relative_l2(found, torch.nn.functional.gelu(exact_linear(x, offset, *parts))) <= 1e-3


def test_the_fused_gelu_is_the_erf_form_everywhere() -> None:
    """Through an identity weight: every fp16 value, whose GELU must be the exact one rounded to fp16, give or take a bit."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite() & (every.abs() <= 60000)]
    if not ON_GPU:
        every = every[::61]  # interpreted
    bias = torch.zeros(-(-len(every) // 256) * 256)
    bias[: len(every)] = every.float()
    bias = bias.to(DEVICE)
    nothing = untouched(torch.zeros(len(bias), 16, dtype=torch.float16, device=DEVICE), bias)
    found = linear.gelu_linear(data(2, 16, dtype=torch.float16), nothing).double()[0]
    wide = bias.double()
    exact = wide * 0.5 * torch.special.erfc(-wide * 2**-0.5)
    tanh = torch.nn.functional.gelu(wide, approximate="tanh")
    assert found.isfinite().all()
    error, size = (found - exact).abs(), exact.abs()
    assert float((error / (size + 2e-3)).max()) <= 7e-4
    assert float(((tanh - exact).abs() / (size + 2e-3)).max()) > 7e-4, "the bound would let the tanh form through"
    assert float((found[size > 1e-3] - exact[size > 1e-3]).mean().abs()) <= 1e-4 * float(size.mean())


def test_what_is_not_a_number_stays_so() -> None:
    """Or a broken weight would end as finite, wrong embeddings."""
    x, (weight, bias) = data(3, 32, dtype=torch.float16), dense(64, 32)
    x[1, 5], bias[7] = torch.nan, torch.nan
    zeros = torch.zeros(32, device=DEVICE)
    found = linear.gelu_linear(x, linear.fold(around(32), (weight, bias), zeros, torch.float16)).isnan()
    assert found[1].all() and found[:, 7].all() and int(found.sum()) == 64 + 2
    assert norm.norm(x, zeros, *around(32)).isnan().any(1).tolist() == [False, True, False]
    x[1, 5] = torch.inf
    assert not norm.norm(x, zeros, *around(32))[1].isfinite().any()
    assert not linear.gelu_linear(x, linear.fold(around(32), dense(64, 32), zeros, torch.float16))[1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "inner"), [(130, 64, 384), (3, 320, 128), (140, 48, 200),
                                                      *([(5, 960, 2560)] if ON_GPU else [])])  # fmt: skip
def test_swiglu_linear_is_swiglu_of_the_linear_layer_of_the_norm(
    rows: int, width: int, inner: int, dtype: torch.dtype
) -> None:
    x, layer = data(rows, width, dtype=dtype), gated(inner, width, 1)
    found = fused.inner(x, prepared(layer, 16, dtype))
    gate, up = exact_linear(x, layer.out[1], layer.norm2, layer.fc1).chunk(2, dim=1)
    assert found.dtype == dtype and found.shape[1] == -(-inner // 128) * 128
    assert relative_l2(found[:, :inner], torch.nn.functional.silu(gate) * up) <= 2 * ROUNDING[dtype]
    assert not found[:, inner:].any(), "what fills the last block"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_half_of_a_gated_layer_is_the_plain_one(dtype: torch.dtype) -> None:
    """An inner width that ends inside a block."""
    x, layer = data(40, 64, dtype=dtype), gated(200, 64, 1)
    (twin,), _ = plain.prepare([layer], layer.norm1, 16, torch.float32)
    found, exact = x.clone(), x.float() + layer.out[1]
    fused.add_inner(found, fused.inner(x, prepared(layer, 16, dtype)), prepared(layer, 16, dtype))
    plain.add_inner(exact, plain.inner(exact, twin), twin)
    assert relative_l2(found.float() + layer.out[1] + layer.fc2[1], exact) <= 3 * ROUNDING[dtype]


def test_the_fused_silu_is_right_everywhere() -> None:
    """Through zero weights: fp16 values of every size as gates, times one."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite() & (every.abs() <= 60000)][:: 1 if ON_GPU else 61]
    gates = torch.zeros(-(-len(every) // 128) * 128)
    gates[: len(every)] = every.float()
    bias = torch.stack((gates.view(-1, 128), torch.ones(len(gates) // 128, 128)), 1).flatten().to(DEVICE)
    nothing = untouched(torch.zeros(len(bias), 16, dtype=torch.float16, device=DEVICE), bias)
    found = linear.swiglu_linear(data(2, 16, dtype=torch.float16), nothing).double()[0].cpu()
    exact = torch.nn.functional.silu(gates.double())
    assert found.isfinite().all()
    assert float(((found - exact).abs() / (exact.abs() + 1e-4)).max()) <= 6e-4


def test_what_is_not_a_number_stays_so_in_a_gated_layer() -> None:
    """In either half of a pair; and one such row of k is in the attention of its whole segment, and of no other."""
    x, layer = data(70, 64, dtype=torch.float16), gated(128, 64, 1)
    for half in (7, 128 + 7):
        broken = layer.fc1[1].clone()
        broken[half] = torch.nan
        found = fused.inner(x, prepared(layer._replace(fc1=(layer.fc1[0], broken)), 16, torch.float16)).isnan()
        assert found[:, 7].all() and int(found.sum()) == 70
    tables = linear.rotary(*torch.zeros(2, 40, 8, device=DEVICE), (torch.arange(70, device=DEVICE) % 40).int())
    tiles = batch_of([40, 30], 70).query_tiles.to(DEVICE)
    for bad in (torch.nan, torch.inf):
        x[33, 5] = bad
        found = fused.query_key_value(x, prepared(layer, 16, torch.float16), tables)
        assert all(each.isnan().nonzero().flatten().tolist() == [33] for each in found[3:])
        mixed = attention.attention(*found[:3], tiles, 0.25, *found[3:]).isnan().flatten(1)
        assert mixed[:40].all() and not mixed[40:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (5, 16), (MANY, 24), (3, 64), (15 if ON_GPU else 5, 64), (1, 128)])  # fmt: skip
def test_queries_and_keys_times_their_scale_are_normed_and_rotated(
    heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Widths at which q ends where a block of columns does, and others."""
    rows, width = 140, heads * head_dim
    x, layer = data(rows, width, dtype=dtype), gated(128, width, heads)
    positions = torch.cat((torch.arange(90), torch.arange(50))).int().to(DEVICE)
    angles = torch.outer(torch.arange(90.0), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).to(DEVICE)

    def run(steps, dtype):
        (ready,), _ = steps.prepare([layer], layer.norm1, head_dim, dtype)
        return steps.query_key_value(x.to(dtype), ready, steps.rotary(angles.cos(), angles.sin(), positions))

    (*found, q_scale, k_scale), exact = run(fused, dtype), run(plain, torch.float32)
    assert q_scale.shape == k_scale.shape == (rows,) and q_scale.dtype == torch.float32
    for got, expected, factor in zip(found, exact, (q_scale, k_scale, None), strict=True):
        assert got.shape == (rows, heads, head_dim) and got.dtype == dtype
        if factor is not None:
            got = got.double() * factor.double()[:, None, None]
            got = got.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        assert relative_l2(got, expected) <= 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[3], [32, 33, 31], [65, 64, 63, 5], [200, 97, 40, 3]])
def test_attention_multiplies_rows_by_their_scale(lengths: list[int], dtype: torch.dtype) -> None:
    rows, heads, head_dim = sum(lengths) + 13, 2, 16
    q, k, v = data(rows, 3, heads, head_dim, dtype=dtype).unbind(1)
    scale = data(2, rows, dtype=torch.float32).abs() + 0.1
    scale[:, sum(lengths) :] = torch.nan
    batch = batch_of(lengths, rows)
    found = attention.attention(q, k, v, batch.query_tiles.to(DEVICE), 0.25, *scale)
    normed = [x.double().cpu() * each.double().cpu()[:, None, None] for x, each in zip((q, k), scale, strict=True)]
    exact = sdpa.attention(*normed, v.double().cpu(), batch, 0.25)
    assert relative_l2(found[: batch.used].cpu(), exact[: batch.used]) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (MANY, 16), (MANY, 24), (4, 64), (1, 128)])
def test_query_key_value_gives_the_scores_and_values_of_its_twin(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    rows, width = 70, heads * head_dim
    x, positions = data(rows, width, dtype=dtype), torch.cat((torch.arange(40), torch.arange(30))).int().to(DEVICE)
    angles = torch.outer(torch.arange(40.0), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).to(DEVICE)
    unused = dense(width, width)
    layer = plain.Layer(around(width), dense(3 * width, width), unused, around(width), unused, unused)

    def run(steps, dtype):
        (prepared,), _ = steps.prepare([layer], around(width), head_dim, dtype)
        tables = steps.rotary(angles.cos(), angles.sin(), positions)
        return torch.stack(steps.query_key_value(x.to(dtype), prepared, tables), dim=1).double()

    found, exact = run(fused, dtype), run(plain, torch.float32)
    assert found.shape == (rows, 3, heads, head_dim)
    assert relative_l2(found[:, 2], exact[:, 2]) <= 1.5 * ROUNDING[dtype]
    restored = found[:, :2].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    assert relative_l2(restored, exact[:, :2]) <= 1.5 * ROUNDING[dtype]


def test_the_stream_holds_no_biases_until_it_is_asked_for() -> None:
    """What leaves a layer is x and the biases of out and fc2 so far, whichever layer it is."""
    spec = ModelSpec("small", 3, 64, 2)
    state = weights.random_state(spec)
    models = [
        build(spec, state, torch.float32, DEVICE, Backend("sdpa", sdpa.attention, steps)) for steps in (plain, fused)
    ]
    so_far = torch.zeros(64, device=DEVICE)
    for twin, layer in zip(*(model.layers for model in models), strict=True):
        so_far = so_far + twin.out[1] + twin.fc2[1]
        assert torch.equal(layer.offset, so_far)
        x = data(4, 64, dtype=torch.float16)
        assert torch.equal(fused.residual(x, layer), (x + so_far).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("lengths", [[3], [32, 33, 31], [65, 64, 63, 5], [200, 97, 40, 3]])
def test_attention_is_softmax_within_each_segment(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    rows, heads = sum(lengths) + 13, 2
    q, k, v = data(rows, 3, heads, head_dim, dtype=dtype).unbind(1)
    batch = batch_of(lengths, rows)
    found = attention.attention(q, k, v, batch.query_tiles.to(DEVICE), head_dim**-0.5)
    exact = sdpa.attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), batch, head_dim**-0.5)
    assert found.shape == q.shape and found.dtype == dtype
    assert relative_l2(found[: batch.used].cpu(), exact[: batch.used]) <= 2 * ROUNDING[dtype]


def test_attention_reads_nothing_of_its_neighbours_not_even_nan() -> None:
    lengths, rows = [40, 33, 20], 100
    qkv = data(rows, 3, 2, 16, dtype=torch.float16)
    tiles = batch_of(lengths, rows).query_tiles.to(DEVICE)
    clean = attention.attention(*qkv.unbind(1), tiles, 0.25)
    qkv[:40], qkv[73:] = torch.nan, torch.inf
    found = attention.attention(*qkv.unbind(1), tiles, 0.25)
    assert torch.equal(found[40:73], clean[40:73])


def test_a_segment_has_the_same_bits_wherever_it_stands() -> None:
    x = data(200, 64, dtype=torch.float16)
    layer = linear.fold(around(64), dense(256, 64), data(64, dtype=torch.float32, seed=3), torch.float16)
    qkv = data(200, 3, 2, 16, dtype=torch.float16, seed=3)
    here, there = slice(90, 160), slice(7, 77)
    moved_x, moved = data(128, 64, dtype=torch.float16, seed=4), data(128, 3, 2, 16, dtype=torch.float16, seed=5)
    moved_x[there], moved[there] = x[here], qkv[here]
    assert torch.equal(linear.gelu_linear(x, layer)[here], linear.gelu_linear(moved_x, layer)[there])
    lengths = [[90, 70, 40], [7, 70, 51]]
    found = [
        attention.attention(*each.unbind(1), batch_of(own, sum(own)).query_tiles.to(DEVICE), 0.25)
        for each, own in zip((qkv, moved), lengths, strict=True)
    ]
    assert torch.equal(found[0][here], found[1][there])


def test_a_row_of_a_gated_layer_has_the_same_bits_wherever_it_stands() -> None:
    layer = prepared(gated(256 if ON_GPU else 128, 80, 5), 16, torch.float16)
    more = 53 if ON_GPU else 9
    x, other = data(240 + more, 80, dtype=torch.float16), data(147 + more, 80, dtype=torch.float16, seed=4)
    here, there = slice(100, 240), slice(7, 147)
    other[there] = x[here]
    assert torch.equal(fused.inner(x, layer)[here], fused.inner(other, layer)[there])
    angles, found = data(140, 8, dtype=torch.float32), []
    for rows, at, lengths in ((x, here, [100, 140, more]), (other, there, [7, 140, more])):
        positions = torch.cat([torch.arange(each) for each in lengths]).int().to(DEVICE)
        q, k, v, *left = fused.query_key_value(rows, layer, linear.rotary(angles.cos(), angles.sin(), positions))
        mixed = attention.attention(q, k, v, batch_of(lengths, len(rows)).query_tiles.to(DEVICE), 0.25, *left)
        found.append([each[at] for each in (q, k, v, *left, mixed)])
    assert all(map(torch.equal, *found))


ESMC = [ModelSpec("gated", 1, 128, 2, "esmc", inner=384), ModelSpec("odd gated", 1, 48, 3, "esmc", inner=200)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [TINY, ModelSpec("small", 1, 128, 2), ModelSpec("odd", 1, 96, 4), *ESMC], ids=lambda s: s.name
)
def test_the_fused_forward_is_the_plain_one(spec: ModelSpec, tmp_path: Path) -> None:
    """The whole chain, with filler rows and proteins of one tile, and of one row more, against fp32."""
    state, dice = weights.random_state(spec), random.Random(0)
    sequences = [random_protein(n, dice) for n in (1, 62, 63)]
    batch = one_pack(tmp_path, sequences, 144, family_of(spec).READING)
    layers = tuple(range(spec.layers + 1))
    rows = {}
    for name, dtype, backend in (
        ("exact", torch.float32, Backend("sdpa", sdpa.attention, plain)),
        ("plain", torch.float16, Backend("sdpa", sdpa.attention, plain)),
        ("fused", torch.float16, Backend("triton", triton.attention, fused)),
        ("portable", torch.float16, Backend("portable", portable_attention.attention, portable)),
    ):
        rows[name] = embeddings(build(spec, state, dtype, DEVICE, backend), batch, layers)
    for kind, layer in rows["exact"].pooled:
        exact, floor, *found = (rows[name].pooled[kind, layer] for name in ("exact", "plain", "fused", "portable"))
        for each in found:
            assert relative_l2(each, exact) <= max(1.5 * relative_l2(floor, exact), 2e-4), (kind, layer)


def test_padded_batches_through_the_fused_steps_finish_the_norms_of_queries_and_keys(tmp_path: Path) -> None:
    """The baseline of `bench`: an attention of PyTorch's, which gets what the steps leave to attention."""
    spec = ESMC[1]
    state = weights.random_state(spec)
    work = workload.made_up("few", np.array([5, 20, 33, 20]), tmp_path, 1022)
    rows = []
    for dtype, steps in ((torch.float32, plain), (torch.float16, fused)):
        model = build(spec, state, dtype, DEVICE, Backend("any", sdpa.attention, steps))
        rows.append(modes.padded(model, work, 80, by_length=True).run())
    assert relative_l2(rows[1], rows[0]) <= 2e-3


# --- sums of segments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("width", [1, 48, 64, 130])
def test_sums_of_segments_have_the_bits_of_pytorchs(width: int, skip: int) -> None:
    """float64 holds every sum of so many fp16 numbers exactly, in whatever order."""
    lengths = [2, 3, 31, 32, 33, 34, 35, 100]
    batch, rows = batch_of(lengths, 300), data(300, width, dtype=torch.float16)
    rows[sum(lengths) :] = float("nan")
    bounds = batch.cu_seqlens.to(DEVICE)
    found = segment_sums(rows, bounds, skip)
    for each, start, stop in zip(found, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert torch.equal(each, rows[start + skip : stop - skip].double().sum(0))


def test_a_sum_with_what_is_not_a_number_is_none() -> None:
    rows = data(70, 8, dtype=torch.bfloat16)
    rows[5, 3] = float("nan")
    bounds = batch_of([30, 40], 70).cu_seqlens.to(DEVICE)
    assert segment_sums(rows, bounds, 1).isnan().nonzero().tolist() == [[0, 3]]


# --- portable steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "half", "is_normed"), [(3, 12, False), (2, 32, True), (5, 8, True)])
def test_portable_queries_and_keys_are_normed_and_rotated(
    heads: int, half: int, is_normed: bool, dtype: torch.dtype
) -> None:
    width, rows = 2 * heads * half, 70 if ON_GPU else 33
    layer = gated(64, width, heads) if is_normed else gated(64, width, heads)._replace(qk_norm=None)
    angles = data(rows, half, dtype=torch.float32, scale=3)
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE).flip(0)
    x = data(rows, width, dtype=dtype)
    found = []
    for steps, kind in ((portable, dtype), (plain, torch.float32)):
        (ready,), _ = steps.prepare([layer], layer.norm1, 2 * half, kind)
        found.append(steps.query_key_value(x.to(kind), ready, steps.rotary(angles.cos(), angles.sin(), positions)))
    for ours, twin in zip(*found, strict=True):
        assert ours.shape == twin.shape and relative_l2(ours, twin) <= 2.5 * ROUNDING[dtype]


def test_portable_steps_are_the_same_bits_wherever_a_row_stands() -> None:
    layer = gated(200, 96, 3)
    (ready,), _ = portable.prepare([layer], layer.norm1, 32, torch.float16)
    size, at = (140, 100) if ON_GPU else (50, 30)
    x, other = (data(2 * size + 20, 96, dtype=torch.float16, seed=seed) for seed in (0, 4))
    here, there = slice(at, at + size), slice(7, 7 + size)
    other[there] = x[here]
    assert torch.equal(portable.inner(x, ready)[here], portable.inner(other, ready)[there])


# --- sums of attention maps ------------------------------------------------------------------------------------------


def totals_of(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, is_fused: bool, skip: int = 0
) -> totals.Totals:
    """Of two layers of proteins of so many tokens; skip: the first tokens of the data are of others."""
    made = totals.Totals(batch_of(lengths, sum(lengths) + 7).to(DEVICE), data(2, heads, dtype=torch.float32), is_fused)
    for layer in range(2):
        q, k = (data(900, heads, head_dim, dtype=dtype, scale=2, seed=2 * layer + each)[skip:] for each in range(2))
        made.add(q[: sum(lengths) + 7], k[: sum(lengths) + 7], head_dim**-0.5)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3 if ON_GPU else 2, 24), (2, 64)])
def test_attention_maps_add_up_to_the_plain_ones(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [3, 66, 64, 130, 12] if ON_GPU else [3, 64, 130]
    ours, twin = (totals_of(lengths, heads, head_dim, dtype, is_fused) for is_fused in (True, False))
    assert relative_l2(ours.total, twin.total) <= 2e-6 and relative_l2(ours.margins, twin.margins) <= 2e-6
    found = ours.probabilities(0)
    assert relative_l2(found, twin.probabilities(0)) <= 1e-5
    for size, start in zip(ours.sizes.tolist(), ours.starts.tolist(), strict=True):
        square = found[start : start + size * size].view(size, size)
        assert torch.equal(square, square.T)


def test_the_maps_of_a_protein_have_the_same_bits_in_any_company() -> None:
    size = 130 if ON_GPU else 70
    first = totals_of([80, size, 9], 2, 24, torch.float16, True)
    other = totals_of([5, size], 2, 24, torch.float16, True, skip=75)
    here, there = (slice(start, start + (size - 2) ** 2) for start in (int(first.starts[1]), int(other.starts[1])))
    assert torch.equal(first.total[here], other.total[there])
    assert torch.equal(first.margins[80 : 80 + size], other.margins[5 : 5 + size])


def test_maps_that_are_not_numbers_stay_so_and_spoil_no_other() -> None:
    made = totals.Totals(batch_of([20, 30], 64).to(DEVICE), data(1, 2, dtype=torch.float32), True)
    q, k = data(64, 2, 16, dtype=torch.float16), data(64, 2, 16, dtype=torch.float16, seed=1)
    q[25], k[60] = torch.nan, torch.nan
    made.add(q, k, 0.25)
    found = made.probabilities(0)
    assert found[: 18 * 18].isfinite().all() and not found[18 * 18 :].isfinite().any()


# --- fp8 ------------------------------------------------------------------------------------------------------------

ACCUMULATOR = 3e-3
"""What a Hopper tensor core loses in e4m3: it adds up in some 14 bits."""


def as_stored(layer: linear.Quantised, x: torch.Tensor) -> torch.Tensor:
    """The layer on what is in memory, in float64: no rounding but that of the stored numbers."""
    normed = norm.quantised_norm(x, layer.offset, layer.step).double()
    return normed @ layer.weight.double().T * layer.unit + layer.bias[: len(layer.weight)].double()


@pytest.mark.parametrize(("rows", "width"), [(5, 32), (130 if ON_GPU else 6, 320), (9 if ON_GPU else 3, 1280)])
def test_the_quantised_norm_is_the_norm_to_four_bits_and_never_above_its_range(rows: int, width: int) -> None:
    x, offset = data(rows, width, dtype=torch.float16), data(width, dtype=torch.float32, seed=1)
    x[1] = offset.neg().half()
    x[1, 3] += 1000  # all of a row's energy in one channel: the largest value that a LayerNorm can have
    step = e4m3.quantise(around(width), dense(256, width), offset).step
    exact = torch.nn.functional.layer_norm(x.double() + offset, (width,), eps=1e-5)
    found = norm.quantised_norm(x, offset, step)
    assert found.dtype == torch.float8_e4m3fn and found.float().isfinite().all()
    assert 224 / 2 <= step * width**0.5 <= 448
    assert ((found.double() / step - exact).abs() <= exact.abs() * 2**-4 * 1.001 + 2**-9 / step).all()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(128, 64, 256), (130, 80, 320), (3, 320, 1280)])
def test_the_fp8_gelu_layer_is_what_its_stored_numbers_say(rows: int, depth: int, columns: int) -> None:
    x, offset = data(rows, depth, dtype=torch.float16), data(depth, dtype=torch.float32, scale=0.5, seed=1)
    parts = around(depth), dense(columns, depth)
    layer = e4m3.quantise(*parts, offset)
    found = linear.gelu_linear(x, layer)
    assert found.shape == (rows, columns) and found.dtype == torch.float8_e4m3fn
    values = found.double() / layer.grain[:columns]
    stored = torch.nn.functional.gelu(as_stored(layer, x))
    coarse = stored.abs() * (2**-4 * 1.01) + 2**-9 / layer.grain[:columns] + ACCUMULATOR * stored.norm(dim=1, keepdim=True) / columns**0.5  # fmt: skip
    assert ((values - stored).abs() <= coarse).all()
    assert relative_l2(values, torch.nn.functional.gelu(exact_linear(x, offset, *parts))) <= 6e-2


def test_an_fp8_layer_never_overflows_however_its_rows_point() -> None:
    """Every row of x lies along a row of the weights: the largest products that a LayerNorm allows."""
    weight, bias = dense(64, 64)
    weight[5] *= 300
    ones, zeros = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    layer = e4m3.quantise((ones, zeros), (weight, bias), zeros)
    x = (weight - weight.mean(1, keepdim=True)).half()
    found = linear.gelu_linear(x, layer).float()
    assert found.isfinite().all() and 100 <= float(found.max()) <= 448
    values, exact = found / layer.grain[:64], exact_linear(x, zeros, (ones, zeros), (weight, bias))
    assert relative_l2(values, torch.nn.functional.gelu(exact)) <= 6e-2


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (MANY, 16), (MANY, 24), (2, 64)])
def test_fp8_query_key_value_is_what_its_stored_numbers_say(heads: int, head_dim: int) -> None:
    rows, width = 70, heads * head_dim
    x, positions = data(rows, width, dtype=torch.float16), (torch.arange(rows, device=DEVICE) % 40).int()
    angles = torch.outer(torch.arange(40.0), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).to(DEVICE)
    layer = e4m3.quantise(around(width), dense(3 * width, width), data(width, dtype=torch.float32, seed=3))
    found = linear.rotary_linear(x, layer, linear.rotary(angles.cos(), angles.sin(), positions))
    stored = as_stored(layer, x).view(rows, 3, heads, head_dim)
    even, odd = stored[:, :2, :, ::2], stored[:, :2, :, 1::2]
    cos, sin = (each.double()[positions][:, None, None] for each in (angles.cos(), angles.sin()))
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    for got, expected in zip(found, (turned[:, 0], turned[:, 1], stored[:, 2]), strict=True):
        assert got.dtype == torch.float16
        assert relative_l2(got, expected) <= ROUNDING[torch.float16] + (ACCUMULATOR if ON_GPU else 0)


@pytest.mark.parametrize(("rows", "depth", "width"), [(128, 256, 64), (131, 320, 80), (5, 1280, 320)])
def test_the_fp8_sum_is_added_to_the_stream(rows: int, depth: int, width: int) -> None:
    inner = data(rows, depth, dtype=torch.float32).to(torch.float8_e4m3fn)
    weight, grain = dense(width, depth)[0], torch.exp2(torch.arange(depth, device=DEVICE) % 5)
    layer = e4m3.quantise_sum(weight, grain)
    x = data(rows, width, dtype=torch.float16, seed=1)
    sum_ = inner.double() @ layer.weight.double().T * layer.unit
    expected = x.double() + sum_
    linear.add_linear(x, inner, layer)
    assert relative_l2(x, expected) <= 2 * ROUNDING[torch.float16] + (ACCUMULATOR if ON_GPU else 0)
    assert relative_l2(sum_, (inner.double() / grain) @ weight.double().T) <= 5e-2


def test_what_is_not_a_number_stays_so_in_fp8() -> None:
    x, (weight, bias) = data(3, 32, dtype=torch.float16), dense(64, 32)
    zeros = torch.zeros(32, device=DEVICE)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        inner = linear.gelu_linear(x, e4m3.quantise(around(32), (weight, bias), zeros))
        assert inner.float().isnan().all(1).tolist() == [False, True, False]
        stream = torch.zeros(3, 32, dtype=torch.float16, device=DEVICE)
        linear.add_linear(stream, inner, e4m3.quantise_sum(dense(32, 64)[0], torch.ones(64, device=DEVICE)))
        assert stream.isnan().all(1).tolist() == [False, True, False]
    weight[7, 3] = torch.nan
    x[1, 5] = 0
    assert linear.gelu_linear(x, e4m3.quantise(around(32), (weight, bias), zeros)).float().isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [TINY, ModelSpec("small", 1, 128, 2)], ids=lambda s: s.name)
def test_the_fp8_forward_is_the_plain_one_roughly(spec: ModelSpec, tmp_path: Path) -> None:
    state, dice = weights.random_state(spec), random.Random(0)
    batch = one_pack(tmp_path, [random_protein(n, dice) for n in (1, 62, 63)], 144)
    layers = tuple(range(spec.layers + 1))
    exact = embeddings(build(spec, state, torch.float32, DEVICE, Backend("sdpa", sdpa.attention, plain)), batch, layers)
    rough = Backend("triton", triton.attention, fused)
    found = embeddings(build(spec, state, torch.float8_e4m3fn, DEVICE, rough), batch, layers)
    for key, rows in exact.pooled.items():
        assert relative_l2(found.pooled[key], rows) <= (1.2e-1 if key[1] else 1e-3), key


@pytest.mark.parametrize("family", ["esm2", "esmc"])
def test_plain_steps_around_the_fused_attention_compute_what_plain_attention_computes(
    family: str, tmp_path: Path
) -> None:
    """As with a residual stream in fp32. Rows of their queries are nearer to each other than rows of their values."""
    spec, dice = ModelSpec("plain", 2, 128, 2, family), random.Random(0)
    state = weights.random_state(spec)
    sequences = [random_protein(length, dice) for length in (5, 70, 1, 33)]
    batch = one_pack(tmp_path, [*sequences, "MK<mask>VL"], 128, family_of(spec).READING)
    exact = build(spec, state, torch.float32, DEVICE, Backend("sdpa", sdpa.attention, plain))
    wide = build(spec, state, torch.float16, DEVICE, Backend("triton", triton.attention, plain, wide=True))
    truth, found = (embeddings(model, batch, (1, 2)) for model in (exact, wide))
    for layer in (1, 2):
        error = relative_l2(found.residue[layer][: batch.used], truth.residue[layer][: batch.used])
        assert error < 3e-3, f"layer {layer}: {error:.1e}"


def test_query_tiles_cover_every_row_of_every_segment_once() -> None:
    lengths = [200, 64, 65, 1 + SPECIAL_TOKENS]
    tiles = batch_of(lengths, sum(lengths)).query_tiles.tolist()
    rows = [row for first, _, stop in tiles for row in range(first, min(first + 64, stop))]
    assert rows == list(range(sum(lengths)))
    ends = np.cumsum(lengths).tolist()
    assert {(start, stop) for _, start, stop in tiles} == set(zip([0, *ends[:-1]], ends, strict=True))


def test_the_tile_is_one_that_the_tests_exercise() -> None:
    assert (linear.ROWS, linear.COLUMNS, linear.DEPTH_BYTES) == (128, 256, 128)
