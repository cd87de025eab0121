"""The attention adapters against softmax written out, and the choice among them."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import attention, plain
from virnucpro_cli.model.attention import sdpa, torch_varlen

CPU = torch.device("cpu")
HEADS = 3


def batch_of(lengths: list[int], rows: int) -> PackedBatch:
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return PackedBatch(
        torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32), bounds,
        torch.tensor(lengths).float() - 2, torch.from_numpy(query_tiles(bounds.long().numpy())).int(), None, None, np.arange(len(lengths)), np.asarray(lengths, np.int64), max(lengths),
    )  # fmt: skip


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """Softmax attention in float64, one segment and one head at a time."""
    out, at = [], 0
    for length in lengths:
        rows = slice(at, at + length)
        heads = [
            torch.softmax(q[rows, h].double() @ k[rows, h].double().T * scale, dim=-1) @ v[rows, h].double()
            for h in range(q.shape[1])
        ]
        out.append(torch.stack(heads, dim=1))
        at += length
    return torch.cat(out)


def qkv(rows: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, HEADS, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize(
    "lengths",
    [[3], [40, 40, 40], [300, 97, 40, 40, 3], [3, 40, 3, 3, 40], [7, 7, 5, 5, 5, 9]],
    ids=["one", "equal", "falling", "mixed", "runs"],
)
def test_sdpa_is_softmax_attention_within_each_segment(lengths: list[int], head_dim: int) -> None:
    rows = sum(lengths) + 11
    q, k, v = qkv(rows, head_dim).unbind(1)
    found = sdpa.attention(q, k, v, batch_of(lengths, rows), head_dim**-0.5)
    assert found.shape == q.shape and found.dtype == q.dtype
    wanted = naive(q, k, v, lengths, head_dim**-0.5)
    assert float((found[: sum(lengths)] - wanted).norm() / wanted.norm()) < 1e-6


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.14.1", "2.15.0"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("longest", [100, 129, 2000])
def test_torch_varlen_calls_flash_attention_whatever_the_longest_segment(
    version: str, capability: tuple[int, int], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: True)
    q, k, v = qkv(longest + 40, 64).half().to("meta").unbind(1)
    batch = batch_of([longest, 40], longest + 40)
    batch = replace(batch, cu_seqlens=batch.cu_seqlens.to("meta"))
    with Operators() as operators:
        found = torch_varlen.attention(q, k, v, batch, 0.125)
    assert found.shape == q.shape
    assert operators.called == ["aten._flash_attention_forward.default"]


@pytest.mark.parametrize(("device", "calls"), [("cpu", 3), ("meta", 6)])
def test_sdpa_on_other_devices_computes_each_segment_alone(device: str, calls: int) -> None:
    lengths = [9, 9, 9, 5, 5, 3]
    q, k, v = qkv(40, 16).to(device).unbind(1)
    with Operators() as operators:
        sdpa.attention(q, k, v, batch_of(lengths, 40), 0.25)
    assert sum("scaled_dot_product" in name for name in operators.called) == calls or device == "meta"
    assert sum(name == "aten.copy_.default" for name in operators.called) == calls


def test_the_scale_is_the_callers() -> None:
    q, k, v = qkv(20, 16).unbind(1)
    found = sdpa.attention(q, k, v, batch_of([20], 20), 2.0)
    assert torch.allclose(found.double(), naive(q, k, v, [20], 2.0), atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = qkv(20, 16).unbind(1)
    found = sdpa.attention(q * 1e3, k * 1e3, v, batch_of([12, 8], 20), 1.0)
    assert torch.allclose(found.double(), naive(q * 1e3, k * 1e3, v, [12, 8], 1.0), atol=1e-4)


def test_what_is_not_a_number_stays_in_its_segment_and_filler_is_never_read() -> None:
    lengths = [5, 5, 9]
    q, k, v = qkv(30, 16).unbind(1)
    clean = sdpa.attention(q, k, v, batch_of(lengths, 30), 0.25)
    for x in (q, k, v):
        x[5:10] = torch.nan
        x[19:] = torch.nan
    found = sdpa.attention(q, k, v, batch_of(lengths, 30), 0.25)
    assert found[5:10].isnan().all()
    assert torch.equal(found[:5], clean[:5]) and torch.equal(found[10:19], clean[10:19])


def test_auto_on_a_cpu_is_sdpa() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert attention.resolve("auto", CPU, dtype) == ("sdpa", sdpa.attention, plain, (), False)


def test_a_named_backend_is_that_backend() -> None:
    assert attention.resolve("sdpa", CPU, torch.float32) == ("sdpa", sdpa.attention, plain, (), False)


@pytest.mark.parametrize("name", ["triton", "portable", "torch_varlen", "efficient", "flash_attn"])
def test_a_named_backend_that_cannot_run_is_an_error_with_the_reason(name: str) -> None:
    with pytest.raises(UserError) as caught:
        attention.resolve(name, CPU, torch.float16)
    message = str(caught.value)
    assert f"backend {name} cannot run here" in message and "auto" in message
    assert "NVIDIA GPU, and this run is on cpu" in message


def test_torch_varlen_is_refused_where_another_flash_attention_stands_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert torch_varlen.refusal(CPU, torch.float16) is None
    monkeypatch.setattr(torch_varlen, "current_flash_attention_impl", lambda: "FA3")
    assert "FA3" in str(torch_varlen.refusal(CPU, torch.float16))


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        attention.resolve("flash3", CPU, torch.float32)
    assert "'flash3'" in str(caught.value)
    assert all(name in str(caught.value) for name in ("auto", *attention.BACKENDS))


def test_kernels_that_do_not_work_here_are_passed_over_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper node without a C compiler, which Triton needs."""
    trial = pytest.importorskip("virnucpro_cli.model.kernels.trial")
    monkeypatch.setattr(attention, "is_nvidia", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def no_compiler(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(trial, "try_out", no_compiler)
    found = attention.resolve("auto", CPU, torch.float16)
    assert found.name == "torch_varlen" and len(found.notes) == 2
    for name, note in zip(("triton", "portable"), found.notes, strict=True):
        assert f"{name} would be faster" in note and "Failed to find C compiler." in note
    with pytest.raises(UserError, match=r"triton cannot run here.*RuntimeError: Failed to find C compiler"):
        attention.resolve("triton", CPU, torch.float16)

    def wordless(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(trial, "try_out", wordless)
    assert "NotImplementedError" in attention.resolve("auto", CPU, torch.float16).notes[0]


def test_a_portable_kernel_that_differs_from_its_twin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = pytest.importorskip("virnucpro_cli.model.kernels.trial")
    from virnucpro_cli.model.kernels import portable

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    trial.try_out(portable, CPU, torch.float16)
    for name, other, blamed in (
        ("rotary", lambda cos, sin, positions: (sin, cos, positions), "rotary_linear or attention"),
        ("inner", lambda x, layer: plain.gelu(portable._linear(x, layer.fc1))[:, : 128 * (2 - layer.gated)], "swiglu"),
        ("last_norm", lambda x, last: (x + last.offset).to(x.dtype), "norm"),
    ):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match=f"{blamed}.* differs"):
            patched.setattr(portable, name, other)
            trial.try_out(portable, CPU, torch.float16)


@pytest.mark.parametrize(("gain", "chosen"), [(1.4, "portable"), (0.8, "torch_varlen")])
def test_portable_kernels_are_taken_unasked_where_they_were_timed_to_be_faster(
    gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pytest.importorskip("virnucpro_cli.model.kernels.trial")
    monkeypatch.setattr(attention, "is_nvidia", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another GPU")
    monkeypatch.setattr(trial, "try_out", lambda *_: None)
    from virnucpro_cli.model.kernels import timed

    monkeypatch.setattr(timed, "gain", lambda *_: gain)
    found = attention.resolve("auto", CPU, torch.float16)
    assert found.name == chosen and f"{gain:.2f} times as fast as plain steps" in found.notes[0]
    assert found.steps.__name__.endswith("portable" if gain > 1 else "plain")
    assert attention.resolve("portable", CPU, torch.float16).name == "portable"
    assert attention.resolve("auto", CPU, torch.float16, "fp32").steps is plain


def test_a_timed_trial_is_made_once_and_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = pytest.importorskip("virnucpro_cli.model.kernels.timed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another GPU")
    made: list[float] = []
    monkeypatch.setattr(timed, "_measured", lambda *_: made.append(1.25) or 1.25)
    both = (attention.Backend("a", sdpa.attention, plain), attention.Backend("b", sdpa.attention, plain))
    for dtype in (torch.float16, torch.float16, torch.bfloat16):
        timed.gain.cache_clear()
        assert timed.gain(*both, CPU, dtype) == 1.25
    timed.gain.cache_clear()
    assert len(made) == 2
    (kept, _) = sorted(tmp_path.rglob("*.json"))
    kept.write_text("{")
    assert timed.gain(*both, CPU, torch.float16) == timed.gain(*both, CPU, torch.bfloat16) == 1.25 and len(made) == 3
    timed.gain.cache_clear()


def test_a_kernel_that_differs_from_its_twin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = pytest.importorskip("virnucpro_cli.model.kernels.trial")
    from virnucpro_cli.model.kernels import fused, linear

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    trial.try_out(fused, CPU, torch.float16)
    gelu_linear = linear.gelu_linear
    monkeypatch.setattr(linear, "gelu_linear", lambda x, layer: gelu_linear(x, layer) * 1.1)
    with pytest.raises(RuntimeError, match="gelu_linear differs"):
        trial.try_out(fused, CPU, torch.float16)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(fused, "_interleaved", lambda each, head_dim: each)
    with pytest.raises(RuntimeError, match="rotary_linear or attention differs"):
        trial.try_out(fused, CPU, torch.float16)
    for name, other, blamed in (
        ("_centred", lambda each: each, "rotary_linear or attention"),
        ("swiglu_linear", lambda x, layer: linear.gelu_linear(x, layer)[:, :128], "swiglu_linear"),
    ):
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(fused, name, other)
        with pytest.raises(RuntimeError, match=f"{blamed} differs"):
            trial.try_out(fused, CPU, torch.float16)
