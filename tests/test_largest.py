"""The largest values that `validate` prints are those of the reference, and what overflows is said."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import test_lucavirus
from conftest import TINY, loaded
from packs import random_protein
from sabotage import wrong_constant_in_16_bit
from test_esmc import SMALL
from virnucpro_cli.alphabet import PAD, TOKENS
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.kinds import NUCLEOTIDE
from virnucpro_cli.model import attention, families, weights
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.validation import largest, oracle_of
from virnucpro_cli.validation.validate import validate_model

CPU = torch.device("cpu")
TEXTS = [b"MKVLAARNDCEQGHILK" * 9, b"M", b"MKUBZOXV", b"MK<mask>VLA", b"W" * 30]


def raw_last_layer(judge: object, tokens: torch.Tensor) -> torch.Tensor:
    """The stream after the reference's last layer [1, L, D], before its norm."""
    found = []
    layer = judge.model.layers[-1]  # type: ignore[attr-defined]
    hook = layer.register_forward_hook(
        lambda *each: found.append(each[2][0] if isinstance(each[2], tuple) else each[2])
    )
    judge.hidden(tokens, (0,))  # type: ignore[attr-defined]
    hook.remove()
    (rows,) = found
    return rows.transpose(0, 1) if rows.shape[0] == tokens.shape[1] else rows


@pytest.mark.parametrize("spec", [TINY, SMALL], ids=["ESM-2", "ESM C"])
def test_the_largest_values_are_those_of_the_reference(spec: ModelSpec, tmp_path: Path) -> None:
    """Each layer, the last before its norm, and whatever stands in the filler of a pack."""
    state = weights.random_state(spec, seed=4)
    state["embed_tokens.weight"][PAD] *= 1000
    model = families.build(spec, state, torch.float32, CPU, attention.resolve("sdpa", CPU, torch.float32))
    path = write_texts(tmp_path / "in.fasta", TEXTS)
    judge = oracle_of(spec)(spec, state)
    encoded = [torch.tensor([judge.encode(text.decode())]) for text in TEXTS]
    lengths = np.array([ids.shape[1] - 2 for ids in encoded])
    values = largest.by_layer(model, path, lengths, families.reading(spec))
    expected = np.zeros(spec.layers + 1)
    with torch.inference_mode():
        for tokens in encoded:
            hidden = judge.hidden(tokens, tuple(range(spec.layers)))
            rows = [*hidden.values(), raw_last_layer(judge, tokens)]
            expected = np.maximum(expected, [float(each.abs().max()) for each in rows])
    assert np.allclose(values, expected, rtol=1e-5)


def test_the_largest_values_of_nucleotides_are_theirs_and_not_those_of_proteins(tmp_path: Path) -> None:
    model = test_lucavirus.checkpoint(tmp_path / "model", "hub", test_lucavirus.authors_model())
    texts = test_lucavirus.sequences_of(NUCLEOTIDE, 60, 90)
    fasta = test_lucavirus.written(tmp_path / "in.fasta", texts)
    verdict = validate_model(
        model=str(model),
        fasta=(str(fasta),),
        kind=NUCLEOTIDE,
        dtype="fp32",
        device="cpu",
        quiet=True,
        token_budget=1024,
    )
    spec, state, _ = loaded(model)
    judge, layers = oracle_of(spec, NUCLEOTIDE)(spec, state), tuple(range(spec.layers))
    with torch.inference_mode():
        hidden = [judge.hidden(torch.tensor([judge.encode(text)]), layers) for text in texts]
    expected = [max(float(each[layer].abs().max()) for each in hidden) for layer in layers]
    assert np.allclose(verdict.largest[:-1], expected, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 8, 80])
def test_lines_are_few_and_cover_every_layer(layers: int) -> None:
    values = np.linspace(1, 100, layers + 1)
    values[-1] = 6550.4
    lines = list(largest.checks(values, torch.float16))
    assert len(lines) == min(9, layers + 1) and all(line.passed is None for line in lines)
    assert lines[0].what.startswith("layer") and " 0" in lines[0].what and lines[-1].what.endswith(f" {layers}")
    assert lines[-1].note == "10% of fp16's 65,504" and lines[-1].worst == 6550.4
    assert "in bf16" in next(largest.checks(values, torch.bfloat16)).part


def test_validate_prints_the_largest_values_and_reports_them_for_each_layer(
    tiny_model: Path, tmp_path: Path, make_fasta: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding that fp16 does not hold is told by its layer, and fails nothing by itself."""
    options = {"fasta": str(make_fasta([20, 30, 50])), "device": "cpu", "quiet": False, "token_budget": 1024}
    report = tmp_path / "report.json"
    verdict = validate_model(model=str(tiny_model), report=str(report), **options)
    values = json.loads(report.read_text())["largest"]
    assert len(values) == TINY.layers + 1 and all(0 < value < 1000 for value in values) and verdict.passed
    printed = capsys.readouterr().err
    assert "Range: largest value of the residual stream in fp32" in " ".join(printed.split())
    assert "65,504" in printed
    tensors = {name: each.clone() for name, each in load_file(tiny_model / "model.safetensors").items()}
    tensors["embed_tokens.weight"] *= 1e8
    huge = tmp_path / "huge"
    huge.mkdir()
    save_file(tensors, huge / "model.safetensors")
    (huge / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    verdict = validate_model(model=str(huge), dtype="fp16", report=str(report), **options)
    assert json.loads(report.read_text())["largest"] == ["inf"] * (TINY.layers + 1)
    (line, *_) = [check for check in verdict.checks if check.part.startswith("Range")]
    assert line.note == "more than 65,504" and not any("Range" in part for part in verdict.failed_parts)


@pytest.fixture(scope="module")
def half_large(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that overflows in fp16 where a tryptophan is."""
    folder = tmp_path_factory.mktemp("large")
    tensors = {name: each.clone() for name, each in load_file(tiny_model / "model.safetensors").items()}
    tensors["embed_tokens.weight"][TOKENS.index("W")] *= 1e7
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    return folder


def with_tryptophans(path: Path, n: int) -> Path:
    """Fourteen proteins, n of them with a tryptophan."""
    generator = random.Random(3)
    texts = [random_protein(20 + 5 * i, generator).replace("W", "A") for i in range(14)]
    path.write_text("".join(f">p{i}\n{'W' if i < n else 'A'}{text}\n" for i, text in enumerate(texts)))
    return path


@pytest.mark.parametrize("residual", ["same", "fp32"])
@pytest.mark.parametrize("n", [5, 14], ids=["some overflow", "all overflow"])
def test_what_overflows_in_the_reference_too_is_not_judged_by_it(
    half_large: Path, n: int, residual: str, tmp_path: Path
) -> None:
    """Proteins beside it are, and rows are held to the limits of the dtype whether they have a floor or not."""
    verdict = validate_model(
        model=str(half_large), device="cpu", dtype="fp16", residual=residual,
        fasta=str(with_tryptophans(tmp_path / "in.fasta", n)), token_budget=1024,
    )  # fmt: skip
    assert verdict.passed, [check for check in verdict.checks if check.passed is False]
    assert any(f"{n} proteins without a noise floor" in note for note in verdict.notes)
    assert any("recomputed in fp32" in note for note in verdict.notes) == (residual == "same")
    by_part = {name: [c for c in verdict.checks if c.part.startswith(name)] for name in ("Precision", "Packing")}
    against = [check for check in by_part["Precision"] if check.limit == "1.5 x / 3 x"]
    assert len(against) == (3 if n == 14 else 21) and {check.passed for check in against} == {None if n == 14 else True}
    held = [check for check in by_part["Precision"] if check.limit in (">= 0.999", "1e-02")]
    assert len(held) == 4 and all(check.passed for check in held)
    bitwise = [check for check in by_part["Packing"] if check.limit]
    assert len(bitwise) == (1 if n == 14 and residual == "same" else 6)


def test_a_mistake_beside_proteins_that_overflow_fails(
    half_large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_constant_in_16_bit(monkeypatch)
    fasta = with_tryptophans(tmp_path / "in.fasta", 5)
    verdict = validate_model(model=str(half_large), device="cpu", dtype="fp16", fasta=str(fasta), token_budget=1024)
    assert any(part.startswith("Precision") for part in verdict.failed_parts)
