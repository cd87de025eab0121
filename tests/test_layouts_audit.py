"""validate --against a file of another tool: right ones pass, wrong rows fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from test_layouts import embedded, exported
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange import layouts
from virnucpro_cli.validation.validate import validate_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """As in test_layouts, with no protein cut."""
    return embedded(tmp_path_factory.mktemp("made"), tiny_model)


def scaled(rows: Any) -> None:
    rows[:] *= 1.05


def swapped(rows: Any) -> None:
    rows[[1, 2]] = rows[[2, 1]]


CASES = [("fair-esm", "mean"), ("npy", "mean"), ("npy", "residue"), ("keyed-h5", "mean"), ("biotrainer", "residue")]


def audited(made: Path, target: Path, tiny_model: Path) -> Any:
    return validate_model(against=target, model=str(tiny_model), fasta=str(made / "in.fasta"))


@pytest.mark.parametrize(("to", "kind"), [*CASES, ("broad", "bos"), ("virnucpro", "mean"), ("scikit-bio", "mean")])
def test_a_right_file_of_another_layout_passes_the_audit(
    made: Path, tmp_path: Path, tiny_model: Path, to: str, kind: str
) -> None:
    target = exported(made, tmp_path / f"x{layouts.named(to).suffix}", to, kinds=(kind,))
    verdict = audited(made, target, tiny_model)
    assert verdict.passed, verdict.checks
    assert sum("relative L2" in check.what for check in verdict.checks) == 1
    assert verdict.environment["file"] == str(target)


@pytest.mark.parametrize("wrong", [scaled, swapped])
@pytest.mark.parametrize("to", ["npy", "keyed-h5", "broad"])
def test_wrong_rows_of_another_layout_fail_the_audit(
    made: Path, tmp_path: Path, tiny_model: Path, to: str, wrong: Callable[[Any], None]
) -> None:
    target = exported(made, tmp_path / f"x{layouts.named(to).suffix}", to)
    if to == "npy":
        wrong(np.load(target, mmap_mode="r+"))
    else:
        with h5py.File(target, "r+") as file:
            places = [file["embeddings"]] if to == "broad" else [file["long"], file["sp|P1|A_B"], file["a_b"]]
            rows = places[0][:] if to == "broad" else np.stack([place[:] for place in places])
            wrong(rows)
            for place, values in zip(places, [rows] if to == "broad" else rows, strict=True):
                place[:] = values
    verdict = audited(made, target, tiny_model)
    assert not verdict.passed
    assert any("relative L2" in check.what and check.passed is False for check in verdict.checks)


def test_the_audit_of_another_layout_needs_model_and_fasta(made: Path, tmp_path: Path) -> None:
    target = exported(made, tmp_path / "x.npy", "npy")
    with pytest.raises(UserError, match="does not say what it was made from"):
        validate_model(against=target, fasta=str(made / "in.fasta"))


def test_the_audit_without_a_layer_is_of_the_last(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    np.save(tmp_path / "y.npy", np.load(exported(made, tmp_path / "x.npy", "npy")))
    table = (tmp_path / "x.tsv").read_text().splitlines()
    (tmp_path / "y.tsv").write_text("".join("\t".join(line.split("\t")[:6]) + "\n" for line in table))
    assert audited(made, tmp_path / "y.npy", tiny_model).passed
