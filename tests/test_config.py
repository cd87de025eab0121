"""Settings: defaults < TOML file < flags, and nothing unknown passes in silence."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from virnucpro_cli import config
from virnucpro_cli.config import EmbedConfig, ValidateConfig, resolve
from virnucpro_cli.errors import UserError


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("given", "stored"),
    [("float16", "fp16"), ("half", "fp16"), ("float32", "fp32"), ("bfloat16", "bf16"), ("fp16", "fp16")],
)
def test_a_dtype_may_have_the_name_that_pytorch_gives_it(given: str, stored: str) -> None:
    assert EmbedConfig(dtype=given).dtype == stored
    assert resolve(ValidateConfig, None, {"dtype": given}).dtype == stored


def test_defaults_give_way_to_the_file_and_the_file_to_flags(tmp_path: Path) -> None:
    path = toml(tmp_path, '[embed]\npool = ["bos", "mean"]\nmax_residues = 500\nstore_dtype = "fp32"\n')
    found = resolve(EmbedConfig, path, {"max_residues": 300, "pool": None, "quiet": None})
    assert found == EmbedConfig(pool=("bos", "mean"), max_residues=300, store_dtype="fp32")
    assert resolve(EmbedConfig, None, {}) == EmbedConfig()


def test_a_flag_may_set_a_value_back_to_its_default(tmp_path: Path) -> None:
    path = toml(tmp_path, '[embed]\nlong = "skip"\n')
    assert resolve(EmbedConfig, path, {"long": "truncate"}).long == "truncate"


def test_a_single_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    found = resolve(EmbedConfig, toml(tmp_path, '[embed]\nlayers = 6\npool = "bos"\ninputs = "a.fasta"\n'), {})
    assert (found.layers, found.pool, found.inputs) == ((6,), ("bos",), ("a.fasta",))


def test_tables_of_other_commands_are_passed_over(tmp_path: Path) -> None:
    assert resolve(EmbedConfig, toml(tmp_path, "[bench]\nrepeats = 3\n"), {}) == EmbedConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[embed]\npol = 'mean'\n", "'pol'"),
        ("[embd]\npool = 'mean'\n", "'embd'"),
        ("pool = 'mean'\n", "'pool'"),
        ("embed = 3\n", "embed"),
        ("[embed]\nmax_residues = 'many'\n", "max_residues"),
        ("[embed]\nmax_residues = true\n", "max_residues"),
        ("[embed]\nmax_residues = 10.5\n", "max_residues"),
        ("[embed]\nquiet = 1\n", "quiet"),
        ("[embed]\nmodel = 650\n", "model"),
        ("[embed]\nreport = 1\n", "report"),
        ("[embed]\nlayers = ['last']\n", "layers"),
        ("[embed]\nlayers = [true]\n", "layers"),
        ("[embed]\npool = [1]\n", "pool"),
        ("[embed]\ninputs = [1]\n", "inputs"),
        ("[embed]\ntoken_budget = 'big'\n", "token-budget"),
        ("[embed\n", "not TOML"),
    ],
)
def test_what_the_file_gets_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve(EmbedConfig, toml(tmp_path, text), {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml"):
        resolve(EmbedConfig, str(tmp_path / "absent.toml"), {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "fp4"}, {"store_dtype": "bf16"}, {"attention": "fast"}, {"long": "cut"}, {"invalid": "ignore"},
        {"id": "last"}, {"pool": ("median",)}, {"pool": ()}, {"layers": ()}, {"token_budget": 1000},
        {"token_budget": "much"}, {"max_residues": 0}, {"long": "window", "overlap": 1022},
        {"long": "window", "overlap": -1}, {"output": "-"}, {"model": ""}, {"report": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_the_name_of_its_option(wrong: dict[str, Any]) -> None:
    option = f"--{list(wrong)[-1].replace('_', '-')}"
    with pytest.raises(UserError, match=option):
        EmbedConfig(**wrong)


def test_the_configurations_that_come_with_the_program_resolve() -> None:
    for path in sorted((ROOT / "configs").glob("*.toml")):
        for table in tomllib.loads(path.read_text()):
            resolve(getattr(config, f"{table.title()}Config"), str(path), {})


def test_options_from_python_may_be_paths_and_single_values() -> None:
    found = resolve(
        EmbedConfig, None, {"inputs": Path("a.fa"), "output": Path("o.h5"), "model": Path("m"), "layers": 3}
    )
    assert found == EmbedConfig(inputs=("a.fa",), output="o.h5", model="m", layers=(3,))
    with pytest.raises(UserError, match="no option 'modle'"):
        resolve(EmbedConfig, None, {"modle": "8M"})
    with pytest.raises(UserError, match="layers"):
        resolve(EmbedConfig, None, {"layers": "last"})


def test_an_option_of_an_earlier_version_is_refused_in_a_file_and_from_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--write is no longer supported: .*--shard"):
        resolve(EmbedConfig, toml(tmp_path, '[embed]\nwrite = "worker"\n'), {"inputs": ("x",), "output": "o.h5"})
    with pytest.raises(UserError, match="--golden is no longer supported"):
        resolve(ValidateConfig, None, {"golden": "g"})
