"""What people meet: exit codes, one clear message, help at once, and a clean stdout."""

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from children import program
from conftest import ROOT
from virnucpro_cli import __version__, cli, embed, waking
from virnucpro_cli.config import BenchConfig, EmbedConfig, ValidateConfig
from virnucpro_cli.config.options import fields_of
from virnucpro_cli.errors import UserError
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import gates

Make = Callable[..., Path]
COMMANDS = list(cli.COMMANDS)
ORDER = [
    "embed",
    "predict",
    "bench",
    "validate",
    "inspect",
    "verify",
    "search",
    "map",
    "extract",
    "export",
    "import",
    "index",
    "status",
    "merge",
    "doctor",
    "models",
    "fetch",
]


pytestmark = pytest.mark.usefixtures("signal_handlers")


class Ran:
    def __init__(self, code: Any, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def main(*arguments: Any) -> Ran:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return Ran(stopped.value.code, *capfd.readouterr())

    return main


@pytest.fixture
def embed_tiny(run: Callable[..., Ran], tiny_model: Path, tmp_path: Path) -> Callable[..., Ran]:
    """`virnucpro embed ... -o out.h5 --model tiny --device cpu`, where later options win."""

    def main(*arguments: Any) -> Ran:
        return run("embed", "-o", tmp_path / "out.h5", "--model", tiny_model, "--device", "cpu", *arguments)

    return main


def assert_user_error(ran: Ran, *words: str) -> None:
    assert ran.code == 2 and ran.out == ""
    assert "Traceback" not in ran.err and "internal error" not in ran.err
    for word in words:
        assert word in ran.err


# --- the real program ----------------------------------------------------------------------------------------------


def test_the_help_lists_what_most_want_first() -> None:
    assert COMMANDS == ORDER


def test_the_program_reads_standard_input_and_keeps_stdout_clean(
    tmp_path: Path, make_fasta: Make, tiny_model: Path
) -> None:
    fasta = make_fasta([10, 20, 30])
    run = program("embed", "-", "-o", "out.h5", "--model", tiny_model, folder=tmp_path, stdin=fasta.read_bytes())
    assert (run.wait(), run.out) == (0, "")
    assert "3 proteins" in run.err and "\x1b" not in run.err
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.complete and file.lengths.tolist() == [10, 20, 30]


def test_help_of_every_command_comes_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom virnucpro_cli.cli import main\n"
        f"for arguments in [['--help'], ['-h'], *([name, '--help'] for name in {COMMANDS!r})]:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stop: assert not stop.code, (arguments, stop.code)\n"
        "print([name for name in ('torch', 'h5py', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage:") == 2 + len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


# --- in this process -----------------------------------------------------------------------------------------------


def test_version(run: Callable[..., Ran]) -> None:
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"virnucpro {__version__}\n")


def test_a_finished_run_exits_0_and_so_does_the_same_run_again(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path
) -> None:
    fasta = make_fasta([10, 20])
    first = embed_tiny(fasta)
    assert (first.code, first.out) == (0, "") and len(first.err.splitlines()) == 5
    assert [line.split()[0] for line in first.err.splitlines()] == ["proteins", "truncated", "time", "file", "next"]
    again = embed_tiny(fasta)
    assert (again.code, again.out) == (0, "") and "already complete" in again.err


def test_tables_of_a_run_are_shown_when_asked_for_and_in_the_report(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path
) -> None:
    ran = embed_tiny(make_fasta([10, 20]), "--verbose", "--report", tmp_path / "r.json")
    assert "Packing" in ran.err and "Throughput" in ran.err
    assert json.loads((tmp_path / "r.json").read_text())["packing"]["packs"] == 1


def test_one_protein_is_counted_as_one(run: Callable[..., Ran], embed_tiny: Callable[..., Ran], tmp_path: Path) -> None:
    """A protein of 1,200 residues with an odd letter, a gap and no neighbour, through embed, merge, search and inspect."""
    (tmp_path / "in.fasta").write_text(f">one\nM1K-{'LE' * 600}\n")
    output, said = tmp_path / "out.h5", []
    ran = embed_tiny(tmp_path / "in.fasta", "--shard", "1/1")
    assert "1 of 1 protein truncated" in ran.err and "1 of 1 protein embedded" in ran.err
    assert "1 of 1 protein with 1 residue outside the alphabet" in ran.err
    assert "1 of 1 protein with gaps, 1 letter - or ." in ran.err
    said.append(ran)
    said.append(run("merge", output))
    assert "1 protein of 1 shard, " in said[-1].err
    said.append(run("search", output, "--query", "one", "-o", tmp_path / "hits.tsv"))
    assert "The mean of 1 protein says little" in said[-1].err and "hits.tsv: 1 query" in said[-1].err
    said += [run("inspect", output), run("status", output)]
    assert [each.code for each in said] == [0] * len(said)
    text = " ".join(each.out + each.err for each in said)
    assert not re.findall(
        r"(?<![\d,.])1 (?:of 1 )?(?:proteins|shards|residues|letters|queries|records|files|threads)\b", text
    )


def test_skipped_and_odd_proteins_are_named_the_first_three(embed_tiny: Callable[..., Ran], tmp_path: Path) -> None:
    records = [*((f"odd{i}", "MK1V") for i in range(4)), *((f"none{i}", "") for i in range(5)), ("good", "MKVL")]
    (tmp_path / "in.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in records))
    ran = embed_tiny(tmp_path / "in.fasta")
    assert "odd0, odd1, odd2, and 1 more" in ran.err
    assert "5 of 10 proteins skipped, their rows are NaN: empty: none0, none1, none2, and 2 more" in ran.err
    assert "5 of 10 proteins embedded; skipped: none0, none1, none2, and 2 more (empty)" in ran.err


def test_skipped_records_exit_3(embed_tiny: Callable[..., Ran], make_fasta: Make) -> None:
    ran = embed_tiny(make_fasta([10, 0, 20]))
    assert (ran.code, ran.out) == (3, "") and "1 of 3 proteins skipped" in ran.err


def test_options_reach_the_file(embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path) -> None:
    ran = embed_tiny(make_fasta([10, 20]), "--layers", "0,-1", "--pool", "bos,mean", "--store-dtype", "fp32", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.layers == [0, 2] and file.dataset("bos", 0).dtype == "float32"


def test_a_config_file_is_read_and_flags_win(embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[embed]\nlayers = [1]\npool = ["bos"]\n')
    assert embed_tiny(make_fasta([10]), "--config", tmp_path / "run.toml", "--layers", "0").code == 0
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.layers == [0] and file.attributes["pool"] == '["bos"]'


def test_dry_run_shows_the_plan_and_writes_nothing(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path
) -> None:
    ran = embed_tiny(make_fasta([10, 0]), "--dry-run")
    assert (ran.code, ran.out) == (0, "") and "Packing" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "3"], ["--layers", "3"]),
        (["--layers", "last"], ["--layers", "'last'"]),
        (["--pool", "median"], ["--pool", "median", "residue"]),
        (["--genes", "six-frame"], ["--genes", "--from contigs"]),
        (["--group", "contig"], ["--group", "--from contigs"]),
        (["--group-regex", "c1"], ["--group-regex", "capturing"]),
        (["--dtype", "fp8"], ["--dtype", "fp16"]),
        (["--long", "cut"], ["--long", "window"]),
        (["--token-budget", "12"], ["--token-budget", "1024"]),
        (["--token-budget", "huge"], ["--token-budget", "huge"]),
        (["--max-residues", "many"], ["--max-residues"]),
        (["--attention", "torch_varlen"], ["torch_varlen", "NVIDIA GPU"]),
        (["--attention", "flash_attn"], ["flash_attn"]),
        (["--attention", "magic"], ["magic"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cpu:x"], ["cpu:x"]),
        (["--model", "esm2_t99"], ["esm2_t99", "650M"]),
        (["--model", "/"], ["config.json"]),
        (["--config", "absent.toml"], ["absent.toml"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--") else "",
)
def test_a_bad_option_is_refused_before_anything_is_written(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    assert_user_error(embed_tiny(make_fasta([10]), *options), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(embed_tiny: Callable[..., Ran], make_fasta: Make) -> None:
    assert_user_error(embed_tiny(make_fasta([10]), "--device", "cuda"), "no usable CUDA GPU", "--device cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"@read\nACGT\n+\nIIII\n", ["nucleotides", "--from contigs"]),
        (b"", ["empty"]),
        (b"MKVLA\n", ["not FASTA"]),
        (b">a\nMKVLA>b\nMKV\n", ["'>' inside"]),
        (b"\x1f\x8b\x08\x00garbage", ["damaged"]),
        (b">a\nMK\0VL\n", ["binary"]),
        (b">a\n" + b"ACGTACGTTGCA" * 20 + b"\n", ["nucleotides", "--force-protein"]),
    ],
    ids=["fastq", "empty", "text", "joined", "gzip", "nul", "dna"],
)
def test_an_input_that_is_no_protein_fasta_is_refused(
    embed_tiny: Callable[..., Ran], tmp_path: Path, content: bytes, words: list[str]
) -> None:
    (tmp_path / "in.fasta").write_bytes(content)
    assert_user_error(embed_tiny(tmp_path / "in.fasta"), "in.fasta", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


def test_what_looks_like_nucleotides_can_be_forced(embed_tiny: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\n" + "ACGTACGTTGCA" * 20 + "\n")
    assert embed_tiny(tmp_path / "in.fasta", "--force-protein").code == 0


def test_contigs_are_embedded_by_one_command(embed_tiny: Callable[..., Ran], tmp_path: Path) -> None:
    contigs = [ROOT / "examples" / "contigs.fna", "--from", "contigs"]
    assert_user_error(embed_tiny(contigs[0]), "nucleotides", "--from contigs")
    ran = embed_tiny(*contigs, "--genes", "six-frame", "--min-aa", "60", "--group", "contig", "--dry-run")
    assert ran.code == 0 and "proteins of 4 contigs" in ran.err and not (tmp_path / "out.h5").exists()
    ran = embed_tiny(*contigs, "--genes", "six-frame", "--min-aa", "60", "--group", "contig")
    assert (ran.code, ran.out) == (0, "") and "out.proteins.faa is of the same contigs" in ran.err
    assert "contigs without proteins" in ran.err and "groups" in ran.err
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.groups is not None and file.groups.ids[0] == "contig_1"
    assert_user_error(embed_tiny(*contigs, "--genes", "six-frame", "--min-aa", "61"), "--overwrite")
    none = [tmp_path / "none.fna", "--from", "contigs"]
    none[0].write_text(">a\nACGT\n")
    assert_user_error(embed_tiny(*none, "-o", tmp_path / "none.h5"), "No protein was found")


def test_a_missing_input_is_named(embed_tiny: Callable[..., Ran], tmp_path: Path) -> None:
    assert_user_error(embed_tiny(tmp_path / "absent.fasta"), "absent.fasta")
    assert_user_error(embed_tiny(tmp_path), str(tmp_path), "directory")


def test_an_output_that_cannot_be_is_refused(embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path) -> None:
    fasta = make_fasta([10])
    assert_user_error(embed_tiny(fasta, "-o", tmp_path / "no" / "out.h5"), f"{tmp_path / 'no'}", "mkdir -p")
    assert_user_error(embed_tiny(fasta, "-o", tmp_path), "directory")


def test_an_output_of_other_settings_is_refused(embed_tiny: Callable[..., Ran], make_fasta: Make) -> None:
    fasta = make_fasta([10])
    assert embed_tiny(fasta).code == 0
    assert_user_error(embed_tiny(fasta, "--layers", "0"), "layers: [2] there, [0] now", "--overwrite")
    assert embed_tiny(fasta, "--layers", "0", "--overwrite").code == 0


def test_a_report_that_cannot_be_written_is_named(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path
) -> None:
    assert_user_error(embed_tiny(make_fasta([10]), "--report", tmp_path / "no" / "r.json"), "r.json")


def test_missing_arguments_are_usage_errors(run: Callable[..., Ran]) -> None:
    assert_user_error(run("embed"), "Usage")
    assert_user_error(run("embd"), "embd")
    assert_user_error(run("fetch"), "model's name")


def test_a_bug_is_logged_whole_and_told_in_two_lines(
    embed_tiny: Callable[..., Ran], make_fasta: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("this cannot happen")

    monkeypatch.setattr(embed, "run", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran = embed_tiny(make_fasta([10]))
    assert (ran.code, ran.out) == (70, "") and "Traceback" not in ran.err
    (log,) = tmp_path.glob("virnucpro-*.log")
    assert str(log) in ran.err and "RuntimeError: this cannot happen" in ran.err
    assert "Traceback" in log.read_text() and "this cannot happen" in log.read_text()


def test_every_option_is_named_in_lower_case_whatever_its_metavar(capsys: pytest.CaptureFixture[str]) -> None:
    """Some versions of Typer take an option's name from its metavar unless it is spelt out."""
    names = set()
    for command in ("embed", "validate", "fetch"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        names |= set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))
    assert {"--model", "--device", "--min-cosine", "--list"} <= names and all(name == name.lower() for name in names)


def test_the_list_of_commands_cuts_no_sentence(run: Callable[..., Ran]) -> None:
    listed = run("--help").out
    assert "..." not in listed.partition("Commands:")[2]
    assert max(map(len, listed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--long", "windw"), "window"), (("--dtype", "fp61"), "fp16"), (("--pool", "mean,bso"), "bos"),
     (("--emit", "contact"), "contacts"), (("--attention", "tritn"), "triton")],
)  # fmt: skip
def test_a_misspelt_value_is_answered_with_the_nearest(
    run: Callable[..., Ran], options: tuple[str, str], words: str
) -> None:
    ran = run("embed", "in.fasta", "-o", "out.h5", *options)
    assert ran.code == 2 and f"Did you mean {words}? Choose " in ran.err


def test_a_misspelt_command_or_option_is_answered_with_the_nearest(run: Callable[..., Ran]) -> None:
    assert "Did you mean 'embed'?" in run("embd").err
    assert "--dtype" in run("embed", "in.fasta", "-o", "out.h5", "--dtyp", "fp16").err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "out.h5", "--virtual"], "--virtual is no longer supported: merge copies rows"),
        (["embed", "in.fasta", "-o", "out.h5", "--write=worker"], "--write is no longer supported: the driver writes"),
        (["validate", "--write-golden", "g"], "--write-golden is no longer supported: golden files are no more"),
    ],
)
def test_an_option_of_an_earlier_version_is_refused_and_the_way_without_it_named(
    run: Callable[..., Ran], arguments: list[str], words: str
) -> None:
    assert_user_error(run(*arguments), words)


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize(
    "option", ["--token-budget=", "--workers=", "--cache-size=", "--shard=1/", "--model=random:8M:", "--layers=", "--report=", "-o"]
)  # fmt: skip
def test_a_number_that_nobody_would_type_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, digits: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.fasta").write_text(">a\nMKV\n")
    model = [] if "--model" in option else ["--model", "random:8M:1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", "in.fasta", "-o", "out.h5", "--dry-run", *model, option + "9" * digits])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said) < 2500 and "internal error" not in said


# --- options are the fields of the configurations ---------------------------------------------------------------------


CONFIGURATIONS = (EmbedConfig, ValidateConfig, BenchConfig)


@pytest.fixture
def help_of(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def of(command: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        return run(command, "--help").out

    return of


def test_the_help_of_embed_begins_with_what_most_people_need(help_of: Callable[..., str]) -> None:
    headings = re.split(r"^(\w[\w ]*):\n", help_of("embed"), flags=re.MULTILINE)
    assert headings[1::2][:2] == ["Arguments", "Most used"]
    assert re.findall(r"--[a-z-]+", headings[4])[:1] == ["--output"]
    assert len(re.findall(r"^  (?:-., )?--", headings[4], re.MULTILINE)) == 5


def test_help_names_arguments_as_people_type_them(help_of: Callable[..., str]) -> None:
    """Some versions of Typer put them in braces, and their types in Python's words beside them."""
    usages = {"embed": "INPUT...", "fetch": "[MODEL...]", "models": "[NAME]", "merge": "OUT.h5"}
    for command, words in usages.items():
        text = help_of(command)
        assert text.partition("\n")[0].endswith(f" {command} [OPTIONS] {words}")
        assert re.search(rf"^  {re.escape(words.strip('[]'))}  ", text, re.MULTILINE) and "<" not in text


def test_help_tells_every_gate_of_validate(help_of: Callable[..., str]) -> None:
    text = " ".join(help_of("validate").split())
    for gates_of in (gates.MIN_COSINE, gates.MAX_REL_L2):
        assert all(f"{value:g}" in text or f"{value:.0e}".replace("e-0", "e-") in text for value in gates_of.values())


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", ["embed", "validate", "bench"])
def test_help_fits_the_terminal(help_of: Callable[..., str], command: str, columns: int) -> None:
    assert max(map(len, help_of(command, columns).splitlines())) <= columns


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: config.__name__)
def test_every_field_is_an_option_and_every_word_that_it_may_be_stands_in_its_help(
    help_of: Callable[..., str], config: type[Any]
) -> None:
    text = " ".join(help_of(config.__name__.removesuffix("Config").lower()).split()).replace("- ", "-")
    for name, field in fields_of(config).items():
        assert field.metavar in text if name == "inputs" else f"{field.flag} " in text, name
        assert field.help == "As in embed." or all(str(word) in text for word in field.choices), name


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: config.__name__)
def test_a_word_or_number_that_no_option_may_be_is_refused_by_the_fields_name(config: type[Any]) -> None:
    for name, field in fields_of(config).items():
        bad: Any = "nothing like it" if field.choices else None
        if field.least is not None:
            bad = field.least - 1 if field.least >= 1 else float("nan")
        if bad is not None:
            with pytest.raises(UserError, match=f"{field.flag} (is|has) {bad!r}|{field.flag} (is|has) {bad}"):
                config(**{name: (bad,) if field.several else bad})


ENDING = """
import atexit, sys
from virnucpro_cli import __main__, cli
class Late:
    def __del__(self): print("taken apart")
late = Late()
cli.main = lambda: (atexit.register(print, "last words"), print("first words", end=" "), sys.exit(3))
__main__.main()
"""


def test_the_program_ends_with_its_code_after_all_last_words_and_is_not_taken_apart() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "first words last words\n")


@pytest.mark.parametrize("device", ["auto", "cuda:0,1", "cuda:99", "cuda:x", "mps", "cpu"])
def test_a_gpu_that_is_not_there_is_woken_in_vain(device: str) -> None:
    waking.wake(device)
    for thread in threading.enumerate():
        if thread.name == "wake":
            thread.join(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "wake"]
