"""`virnucpro validate`: honest runs pass, every mistake fails and is caught by the part that should see it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import VIRAL, read_fasta
from sabotage import (  # fmt: skip
    MISTAKES,
    MORE_MISTAKES,
    Mistake,
    in_collation,
    positions_run_on,
    tanh_gelu_in_16_bit,
    without_packing,
    wrong_constant_in_16_bit,
)
from virnucpro_cli import embed
from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model import pooling
from virnucpro_cli.store import DONE, read_embeddings
from virnucpro_cli.validation import agreement, fair_esm, oracle, plain_reader, validate
from virnucpro_cli.validation.validate import validate_model
from virnucpro_cli.validation.verdict import Verdict

EDGES = Path(validate.shipped()[1])


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine proteins of 1 to 157 residues, odd ones among them."""
    path = tmp_path_factory.mktemp("validate") / "nine.fasta"
    short = [record for record in read_fasta(VIRAL) if len(record[1]) < 160][:33:8]
    edges = [(plain_reader.name_of(header), text.decode()) for header, text in plain_reader.records(str(EDGES))][1:8:2]
    path.write_text("".join(f">{name}\n{text.strip()}\n" for name, text in [*short, *edges]))
    return path


REMEMBERED: dict[Any, oracle.Rows] = {}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, proteins: Path) -> Iterator[Callable[..., Verdict]]:
    """Validate on the CPU; the reference's rows are computed once for all tests."""
    rows_of = oracle.rows_of

    def remembered(
        judge: fair_esm.Reference, sample: oracle.Sample, layers: tuple[int, ...], *rest: int
    ) -> oracle.Rows:
        key = (next(judge.model.parameters()).dtype, tuple(map(tuple, sample.tokens)), layers, rest)
        if key not in REMEMBERED:
            REMEMBERED[key] = rows_of(judge, sample, layers, *rest)
        return REMEMBERED[key]

    monkeypatch.setattr(oracle, "rows_of", remembered)

    def run(**options: Any) -> Verdict:
        return validate_model(**{"fasta": proteins, "device": "cpu", "model": "demo", "token_budget": 1024, **options})

    yield run


def parts(verdict: Verdict) -> set[str]:
    """First words of the parts that failed."""
    return {part.split(":")[0] for part in verdict.failed_parts}


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_honest_run_passes(judged: Callable[..., Verdict], dtype: str) -> None:
    verdict = judged(dtype=dtype)
    assert verdict.passed, verdict.failed_parts
    packing = [check for check in verdict.checks if check.part.startswith("Packing") and check.limit]
    assert len(packing) == 6 and all(check.limit == "bitwise" and check.worst == 0 for check in packing)
    assert len(verdict.records) == 9


@pytest.mark.parametrize("mistake", [None, *MISTAKES, *MORE_MISTAKES])
def test_every_mistake_and_nothing_else_fails_the_semantics(
    judged: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, mistake: str | None
) -> None:
    without_packing(monkeypatch)
    if mistake is not None:
        (MISTAKES | MORE_MISTAKES)[mistake](monkeypatch)
    assert ("Semantics" in parts(judged(model=str(tiny_model)))) == (mistake is not None)


@pytest.mark.slow
@pytest.mark.demo
def test_positions_that_run_on_fail_the_packing(
    judged: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE sees differences of positions only, so nothing but the bits tells."""
    in_collation(positions_run_on)(monkeypatch)
    assert "Packing" in parts(judged())


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize(
    ("mistake", "dtype", "model"),
    [(wrong_constant_in_16_bit, "bf16", "demo"), (wrong_constant_in_16_bit, "fp16", "tiny"), (tanh_gelu_in_16_bit, "fp16", "demo")],
)  # fmt: skip
def test_a_mistake_of_16_bit_kernels_fails_the_precision(
    judged: Callable[..., Verdict],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    mistake: Mistake,
    dtype: str,
    model: str,
) -> None:
    """A tanh GELU is below the noise of bf16, and of a tiny model; fp16 sees it in a real one."""
    without_packing(monkeypatch)
    mistake(monkeypatch)
    assert parts(judged(dtype=dtype, model=str(tiny_model) if model == "tiny" else model)) == {"Precision"}


@pytest.fixture
def alike(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A model whose layers add little, and a protein of one letter among others: its rows are nearly alike."""
    state = load_file(tiny_model / "model.safetensors")
    shutil.copytree(tiny_model, tmp_path / "small")
    small = {name: each * 0.1 if each.dim() > 1 and "embed" not in name else each for name, each in state.items()}
    save_file(small, tmp_path / "small" / "model.safetensors")
    names = {name.split()[0]: text for name, text in read_fasta(EDGES)}
    chosen = ("edge:one_letter", "edge:two_residues", "edge:masked", "edge:one_residue")
    (tmp_path / "alike.fasta").write_text("".join(f">{name}\n{names[name]}\n" for name in chosen))
    return {"model": str(tmp_path / "small"), "fasta": tmp_path / "alike.fasta"}


def test_a_deviation_of_rows_that_are_nearly_alike_may_differ_by_what_these_do(
    judged: Callable[..., Verdict], alike: dict[str, Any]
) -> None:
    verdict = judged(**alike)
    assert verdict.passed, verdict.failed_parts
    owed = [check for check in verdict.checks if check.note == "1 owed to rows nearly alike"]
    assert [(check.what, check.record) for check in owed] == [
        (f"std, layer {layer}: relative L2", "edge:one_letter") for layer in (1, 2)
    ]
    assert all(check.worst is not None and check.worst > 1e-4 for check in owed)


def test_a_wrong_deviation_fails_the_semantics_however_alike_the_rows_are(
    judged: Callable[..., Verdict], alike: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a divisor of one residue less; that changes a deviation of 64 rows by 0.8 %."""

    def of_a_sample(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return pooling.deviation(hidden, batch) * (batch.divisor / (batch.divisor - 1).clamp(1)).sqrt()[:, None].float()

    monkeypatch.setitem(pooling.POOLS, "std", of_a_sample)
    fasta = Path(alike["fasta"])
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in read_fasta(fasta) if "one_" in name))
    failed = [check.what for check in judged(**alike).checks if check.passed is False]
    assert failed == [f"std, layer {layer}: relative L2" for layer in (1, 2)]


def test_the_reference_finds_no_deviation_in_equal_rows() -> None:
    """Not even in fp64, where the sum of 61 equal numbers over 61 may be another number."""
    row = np.random.default_rng(0).standard_normal(500)
    rows = np.tile(row, (61, 1))
    assert not oracle.pooled(rows, row, row)["std"].any()
    rows[7, 3] += 1e-9
    assert np.allclose(oracle.pooled(rows, row, row)["std"][3], 1e-9 * (1 / 61 - 1 / 61**2) ** 0.5, rtol=1e-6)


def test_the_users_own_gates_are_obeyed(judged: Callable[..., Verdict], tiny_model: Path) -> None:
    strict = judged(model=str(tiny_model), dtype="bf16", min_cosine=0.99999, max_rel_l2=1e-3)
    failed = {check.what for check in strict.checks if check.passed is False}
    assert failed == {f"{kind}, layer 2: {what}" for kind in ("mean", "bos") for what in ("cosine", "relative L2")}


def test_the_sample_is_spread_over_lengths_and_holds_the_odd_ones() -> None:
    lengths = np.arange(1, 1001)
    odd = np.zeros(1000, np.uint16)
    odd[[17, 500, 700]] = [1, 2, 1 << 15]
    chosen = oracle.stratified(lengths, odd, 50, seed=1)
    assert len(chosen) == 50 and {0, 999, 17, 500, 700} <= set(chosen.tolist())
    assert np.diff(np.sort(lengths[chosen])).max() < 100
    assert (chosen == oracle.stratified(lengths, odd, 50, seed=1)).all()
    assert not np.array_equal(chosen, oracle.stratified(lengths, odd, 50, seed=2))


def test_one_of_the_users_own_proteins_is_enough_to_know_its_name(
    judged: Callable[..., Verdict], proteins: Path, tiny_model: Path
) -> None:
    names = {record["name"] for record in judged(model=str(tiny_model), sample=3).records}
    assert names <= {name for name, _ in read_fasta(proteins)}


def test_too_few_proteins_are_a_user_error(tmp_path: Path, judged: Callable[..., Verdict]) -> None:
    path = tmp_path / "one.fasta"
    path.write_text(">a\nMKV\n")
    with pytest.raises(UserError, match="two proteins"):
        judged(fasta=path)


def test_errors_are_zero_only_for_equal_rows() -> None:
    a = np.asarray([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.asarray([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    assert agreement.relative_l2(b, a).tolist() == [0, 0, np.inf]
    assert agreement.cosine(a, b).tolist() == pytest.approx([1, 1, 0])
    assert agreement.neighbours_kept(np.eye(6), np.eye(6), 2) == 1


# --- the audit of a file -------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path, proteins: Path, tiny_model: Path) -> Callable[..., Path]:
    def write(**options: Any) -> Path:
        output = tmp_path / "out.h5"
        embed.embed_fasta(proteins, output, **{"model": str(tiny_model), "device": "cpu", **options})
        return output

    return write


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": KINDS, "layers": (0, 1, -1), "store_dtype": "fp32"},
        {"long": "window", "max_residues": 60, "overlap": 20, "pool": ("mean", "bos", "eos", "residue")},
        {"long": "full", "max_residues": 60},
        {"max_residues": 60, "invalid": "skip", "pool": ("residue",)},
        {"long": "skip", "max_residues": 100, "id": "full", "dtype": "bf16"},
    ],
)
def test_an_honest_file_passes_its_audit(written: Callable[..., Path], options: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "audit.json"
    verdict = validate_model(against=written(**options), report=report)
    assert verdict.passed, [check for check in verdict.checks if check.passed is False]
    assert json.loads(report.read_text())["passed"] is True


def poke(path: Path, dataset: str, at: Any, value: Any) -> None:
    import h5py

    with h5py.File(path, "r+") as file:
        file[dataset][at] = value


@pytest.mark.parametrize(
    ("dataset", "at", "value", "named"),
    [
        ("lengths", 3, 7, "lengths"),
        ("sequence_ids", 0, "other", "ids"),
        ("flags", 2, 1, "truncated"),
        ("status", 4, 2, "statuses and reasons"),
        ("status", 4, 2, "statuses and reasons"),
        ("reason", 4, 2, "statuses and reasons"),
        ("replaced", 1, 3, "replaced"),
        ("flags", 1, 8, "copied"),
        ("flags", 1, 512, "flags"),
        ("run/complete", (), 0, "complete"),
        ("mean/2", (2, 5), np.nan, "done rows finite, skipped rows NaN"),
        ("mean/2", (5, slice(0, 32, 2)), 0.5, "mean, layer 2: relative L2"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    written: Callable[..., Path], dataset: str, at: Any, value: Any, named: str
) -> None:
    path = written()
    poke(path, dataset, at, value)
    verdict = validate_model(against=path)
    assert named in {check.what for check in verdict.checks if check.passed is False}


def give_up(path: Path) -> None:
    poke(path, "status", 3, 2)
    poke(path, "reason", 3, 4)
    poke(path, "mean/2", 3, np.nan)


def embeddings_elsewhere(path: Path) -> None:
    import h5py

    with h5py.File(path, "r+") as file:
        del file["embeddings"]
        file["embeddings"] = file["mean/0"]


def attribute(name: str, value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        import h5py

        with h5py.File(path, "r+") as file:
            file.attrs[name] = value

    return change


def offsets_shifted(path: Path) -> None:
    poke(path, "residue/offsets", slice(1, 3), [1, 2])


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (give_up, "mean, layer 2: relative L2"),
        (embeddings_elsewhere, "/embeddings"),
        (attribute("dtype", "bfloat16"), "attributes agree with the fingerprint"),
        (attribute("layers", "[2]"), "attributes agree with the fingerprint"),
        (offsets_shifted, "residue/offsets"),
    ],
)
def test_tampering_is_named(written: Callable[..., Path], tamper: Callable[[Path], None], named: str) -> None:
    path = written(layers=(0, 2), pool=("mean", "residue"))
    tamper(path)
    verdict = validate_model(against=path)
    assert named in {check.what for check in verdict.checks if check.passed is False}


def test_a_copy_that_is_not_like_its_original_is_noticed(tmp_path: Path, proteins: Path, tiny_model: Path) -> None:
    twice, output = tmp_path / "twice.fasta", tmp_path / "twice.h5"
    twice.write_text(proteins.read_text() * 2)
    embed.embed_fasta(twice, output, model=str(tiny_model), device="cpu")
    assert validate_model(against=output, sample=2).passed
    poke(output, "mean/2", (12, 5), 3.0)
    failed = {check.what for check in validate_model(against=output, sample=2).checks if check.passed is False}
    assert "copies equal their originals" in failed


@pytest.mark.parametrize(
    "damage", [attribute("fingerprint", "{"), attribute("config", "{}"), attribute("inputs", "[]")]
)
def test_a_damaged_file_is_a_user_error(written: Callable[..., Path], damage: Callable[[Path], None]) -> None:
    path = written()
    damage(path)
    with pytest.raises(UserError, match="is cut short or damaged"):
        validate_model(against=path)


def test_names_and_first_headers_are_read_as_embed_reads_them(tmp_path: Path, tiny_model: Path) -> None:
    odd, output = tmp_path / "odd.fasta.gz", tmp_path / "odd.h5"  # a name that lies: it is not compressed
    odd.write_bytes("\ufeff  \n  >a\u00a0b c\nMKVLAT\n>d\u3000e\r\nMKV*\r\n>\nmkvt\n>\u00e9\x1c x\nMKVTT\n".encode())
    for policy in ("first", "full"):
        embed.embed_fasta(odd, output, model=str(tiny_model), device="cpu", id=policy, overwrite=True)
        verdict = validate_model(against=output)
        assert verdict.passed, [check for check in verdict.checks if check.passed is False]


def test_nothing_that_is_read_is_overwritten(written: Callable[..., Path], proteins: Path, tmp_path: Path) -> None:
    path = written()
    for options in ({"against": path, "report": path}, {"fasta": proteins, "report": proteins}):
        with pytest.raises(UserError, match="would overwrite"):
            validate_model(**options)
    with pytest.raises(UserError, match="no meaning with --against"):
        validate_model(against=path, dtype="bf16")


def test_inputs_that_are_damaged_or_pipes_are_user_errors(tmp_path: Path) -> None:
    import gzip

    cut = tmp_path / "cut.fasta.gz"
    cut.write_bytes(gzip.compress(b">a\nMKV\n>b\nMKL\n" * 500)[:60])
    for fasta, named in ((cut, "damaged"), ("-", "read only once"), (tmp_path / "absent", "no file")):
        with pytest.raises(UserError, match=named):
            validate_model(fasta=fasta)


def test_rows_of_neighbours_exchanged_are_noticed(written: Callable[..., Path]) -> None:
    path = written()
    with read_embeddings(path) as file:
        assert (file.status == DONE).all()
        rows = file[:]
    poke(path, "mean/2", slice(None), np.roll(rows, 1, axis=0))
    verdict = validate_model(against=path)
    assert {check.what for check in verdict.checks if check.passed is False} >= {"mean, layer 2: relative L2"}


def test_other_weights_and_another_fasta_are_noticed(
    written: Callable[..., Path], proteins: Path, tmp_path: Path
) -> None:
    path = written()
    other = tmp_path / "other.fasta"
    other.write_text(proteins.read_text().replace("MKV", "MKI"))
    verdict = validate_model(against=path, fasta=other)
    assert "input" in {check.what for check in verdict.checks if check.passed is False}
    from conftest import write_model

    verdict = validate_model(against=path, model=str(write_model(tmp_path / "model", seed=1)))
    failed = {check.what for check in verdict.checks if check.passed is False}
    assert {"weights", "mean, layer 2: relative L2"} <= failed


def test_a_file_that_is_not_ours_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_text("no")
    with pytest.raises(UserError, match="not an HDF5 file"):
        validate_model(against=path)
    with pytest.raises(UserError, match="There is no"):
        validate_model(against=tmp_path / "absent.h5")
