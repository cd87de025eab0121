"""Facts about the hot path that no noise can touch: operations a layer, no waiting for the device, no Python per protein."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from packs import one_pack
from virnucpro_cli import fasta
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model import plain, weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import first_fit_decreasing

VIEWS = {"view", "slice", "unsqueeze", "split", "select", "t", "transpose", "as_strided", "expand", "detach", "alias", "_unsafe_view", "split_with_sizes", "unbind", "permute", "squeeze", "chunk", "flatten"}  # fmt: skip
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy_to_host"}
OPERATIONS_A_LAYER = 26
"""Of the plain forward on the CPU without attention: two norms, four GEMMs, the rotary embedding, GELU, two sums. On a
GPU its GELU is one operation instead of five."""


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def no_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    return v.contiguous()


def forward(model: PackedModel, batch: PackedBatch, kinds: tuple[str, ...] = ("mean",)) -> Embeddings:
    return model.embed(batch, (model.spec.layers,), Pooler(kinds, torch.float16))


def model_of(layers: int) -> PackedModel:
    spec = ModelSpec("tiny", layers, 32, 4)
    return build(
        spec, weights.random_state(spec), torch.float32, torch.device("cpu"), Backend("none", no_attention, plain)
    )


def counted(layers: int, sequences: list[str], folder: Path) -> Counter[str]:
    model, batch = model_of(layers), one_pack(folder, sequences, 4096)
    forward(model, batch)
    with Count() as count:
        forward(model, batch, KINDS)
    return count.names


def test_operations_do_not_depend_on_the_number_of_proteins_and_are_few_a_layer(tmp_path: Path) -> None:
    few, many = (counted(2, ["MKV" * 10] * n, tmp_path) for n in (2, 100))
    assert few == many
    deeper = counted(6, ["MKV" * 10] * 2, tmp_path)
    assert (deeper - few).total() / 4 <= OPERATIONS_A_LAYER
    assert not WAITS & set(few), "the forward waits for the device"


def python_calls(call: Any) -> int:
    calls = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def test_python_does_nothing_per_protein_in_the_forward(tmp_path: Path) -> None:
    model = model_of(2)
    few, many = (one_pack(tmp_path, ["MKV" * 10] * n, 4096) for n in (2, 100))
    forward(model, many)
    counts = [python_calls(lambda b=b: forward(model, b, KINDS)) for b in (few, many)]  # type: ignore[misc]
    assert counts[0] == counts[1]


def test_what_goes_to_the_device_is_a_few_bytes_a_token(tmp_path: Path) -> None:
    batch = one_pack(tmp_path, ["MKV" * 30] * 40, 4096)
    tensors = [batch.tokens, batch.positions, batch.cu_seqlens, batch.divisor, batch.query_tiles]
    assert batch.mask_ratio is None and batch.weights is None
    assert sum(t.numel() * t.element_size() for t in tensors) <= 8.5 * 4096


def test_planned_density_of_real_proteins() -> None:
    """5,000 UniProt proteins: as few packs as there can be, all but the last full."""
    table = fasta.index(fasta.open_sources([str(ROOT / "tests" / "data" / "uniprot_5k.fasta.gz")], Path("/tmp")))
    for budget, least in ((2048, 0.995), (16384, 0.9999), (32768, 0.9999)):
        plan = first_fit_decreasing(table.length.clip(0, 1022), budget)
        assert plan.density_without_last >= least
        assert len(plan) <= -(-int(plan.tokens.sum()) // budget) + (5 if budget == 2048 else 0)
