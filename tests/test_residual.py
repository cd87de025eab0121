"""`--residual fp32`: rows that fp16 cannot hold are there without a second pass, and the setting is the file's own."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY
from packs import among_strangers, proteins
from test_adapters import stopped_after_one_pack
from test_esmc import SMALL
from test_model import CPU, embed, expected, same_bits, worst
from virnucpro_cli import embed_fasta, read_embeddings
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import run
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.model import attention, families, plain, weights
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.store import RECOMPUTED
from virnucpro_cli.validation import oracle_of
from virnucpro_cli.validation.validate import validate_model

ESM1B = ModelSpec("small", 3, 96, 4, "esm1b", 1022)
SPECS = [TINY, replace(TINY, family="dplm"), ESM1B, SMALL]


def model_in(spec: ModelSpec, state: dict[str, torch.Tensor], dtype: torch.dtype, residual: str) -> PackedModel:
    return families.build(spec, state, dtype, CPU, attention.resolve("sdpa", CPU, dtype, residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("spec", SPECS, ids=[spec.family for spec in SPECS])
def test_a_wide_stream_errs_no_more_in_any_family(spec: ModelSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    """Layers 0, the middle and the last; layer 0 is exact."""
    state, sequences = weights.random_state(spec, seed=2), [*proteins(60, 300), "MK<mask>VLA", "M"]
    layers = (0, spec.layers // 2, spec.layers)
    wanted = [expected(oracle_of(spec)(spec, state), sequence, layers) for sequence in sequences]
    errors = {
        residual: worst(embed(model_in(spec, state, dtype, residual), sequences, tmp_path, layers), wanted)["residue"]
        for residual in ("same", "fp32")
    }
    assert errors["fp32"] < 1.1 * errors["same"] and errors["fp32"] < (3e-3 if dtype == torch.float16 else 3e-2)
    wide = embed(model_in(spec, state, dtype, "fp32"), sequences, tmp_path, (0,))
    assert worst(wide, [{key: rows for key, rows in each.items() if key[1] == 0} for each in wanted])["residue"] < 1e-6


@pytest.mark.parametrize("spec", [TINY, SMALL], ids=["ESM-2", "ESM C"])
def test_a_protein_has_the_same_bits_in_any_company(spec: ModelSpec, tmp_path: Path) -> None:
    model = model_in(spec, weights.random_state(spec), torch.float16, "fp32")
    probes = proteins(5, 200, 61)
    alone = [embed(model, [probe], tmp_path, (0, 1, spec.layers), rows=1024)[0] for probe in probes]
    for rows in (1024, 2048):
        sequences, at = among_strangers(probes, rows, random.Random(rows))
        found = embed(model, sequences, tmp_path, (0, 1, spec.layers), rows=rows)
        assert all(same_bits(found[i], one) for i, one in zip(at, alone, strict=True))


def test_fp32_is_the_same_with_either_and_fp8_is_refused(tmp_path: Path) -> None:
    same, wide = (attention.resolve("sdpa", CPU, torch.float32, residual) for residual in ("same", "fp32"))
    assert same == wide and not same.wide
    backend = attention.resolve("auto", CPU, torch.float16, "fp32")
    assert backend.wide and backend.steps is plain and "residual stream in float32" in backend.notes[0]
    with pytest.raises(UserError, match="keeps its residual stream in fp16"):
        attention.resolve("auto", CPU, torch.float8_e4m3fn, "fp32")


@pytest.fixture
def large(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with a stream that fp16 does not hold."""
    tensors = {name: each.clone() for name, each in load_file(tiny_model / "model.safetensors").items()}
    tensors["embed_tokens.weight"] *= 1e6
    (tmp_path / "large").mkdir()
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    (tmp_path / "large" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    return tmp_path / "large"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_fp16_cannot_hold_needs_no_second_pass(
    large: Path, workers: int, tmp_path: Path, make_fasta: Callable[..., Path]
) -> None:
    fasta = make_fasta([300] * 8)
    common: dict[str, Any] = {
        "model": str(large), "device": "cpu", "store_dtype": "fp32", "token_budget": 1024, "workers": workers,
    }  # fmt: skip
    rows, flags = {}, {}
    for name, options in (
        ("exact", {"dtype": "fp32"}), ("same", {"dtype": "fp16"}), ("wide", {"dtype": "fp16", "residual": "fp32"}),
    ):  # fmt: skip
        embed_fasta(fasta, tmp_path / f"{name}.h5", **common, **options)
        with read_embeddings(tmp_path / f"{name}.h5") as file:
            rows[name], flags[name] = file.dataset("mean", TINY.layers)[:], file.flags[:] & RECOMPUTED
    assert flags["same"].all() and not flags["wide"].any()
    error = np.linalg.norm(rows["wide"] - rows["exact"]) / np.linalg.norm(rows["exact"])
    assert 0 < error < 3e-3


def test_the_residual_stream_is_a_setting_of_the_file_where_it_changes_its_rows(
    tiny_model: Path, tmp_path: Path, make_fasta: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fingerprint, Methods sentence and cache; in fp32 it is no setting."""
    config = EmbedConfig(
        inputs=(str(make_fasta([20, 30])),), output=str(tmp_path / "o.h5"), model=str(tiny_model), device="cpu",
        dtype="fp16", quiet=True, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    stopped_after_one_pack(monkeypatch, config)
    wide = replace(config, residual="fp32")
    with pytest.raises(UserError, match="residual"):
        run(wide)
    run(config)
    with read_embeddings(config.output) as file:
        assert "residual" not in file.settings and "residual" not in inspect.methods(file)
    done = run(replace(wide, output=str(tmp_path / "wide.h5")))
    assert done.counts["from the cache"] == 0
    with read_embeddings(tmp_path / "wide.h5") as file:
        assert file.settings["residual"] == "fp32"
        assert "in float16 and a residual stream in float32" in " ".join(inspect.methods(file).split())
    run(replace(wide, output=str(tmp_path / "exact.h5"), dtype="fp32"))
    with read_embeddings(tmp_path / "exact.h5") as file:
        assert "residual" not in file.settings


def test_a_search_embeds_its_queries_with_the_stream_of_the_file(
    large: Path, tmp_path: Path, make_fasta: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from virnucpro_cli.explore import search

    fasta = make_fasta([20, 30, 40])
    embed_fasta(fasta, tmp_path / "o.h5", model=str(large), dtype="fp16", residual="fp32")
    used, real = [], search.embed.run
    monkeypatch.setattr(search.embed, "run", lambda config: (used.append(config), real(config)))
    asked = search.SearchConfig(
        file=str(tmp_path / "o.h5"), query=str(fasta), k=1, raw=True, output=str(tmp_path / "t")
    )
    assert search.search_file(asked) == 0
    assert [config.residual for config in used] == ["fp32"] and used[0].dtype == "fp16"


def test_validate_judges_a_wide_stream_and_shows_what_it_reaches(large: Path, make_fasta: Callable[..., Path]) -> None:
    verdict = validate_model(
        model=str(large), device="cpu", dtype="fp16", residual="fp32", fasta=str(make_fasta([20, 30, 50])),
        token_budget=1024,
    )  # fmt: skip
    assert all(np.isfinite(verdict.largest)) and max(verdict.largest) > 65504
    assert "Range: largest value of the residual stream in fp32" in {check.part for check in verdict.checks}
    assert any("residual stream in float32" in note for note in verdict.notes)
    assert not any("recomputed" in note for note in verdict.notes)
