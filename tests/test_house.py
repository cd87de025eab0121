"""How the house is built: packages in one order, no circle of files, and one home for each heavy library."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT
from virnucpro_cli import embed_fasta
from virnucpro_cli.model import families

PACKAGE = ROOT / "src" / "virnucpro_cli"
NAMES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

ORDER = (
    "errors", "alphabet", "kinds", "texts", "stopping", "processes", "waking", "scratch", "config", "report",
    "store", "fasta", "tables", "plan", "batch", "model", "engine", "machine", "features", "cluster", "embed",
    "exchange", "predict", "validation", "benchmark", "explore", "cli", "__main__",
)  # fmt: skip
"""A file imports from its own package and from those before it."""


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of every import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


@cache
def imports_of(name: str) -> set[str]:
    return set(imported(tree_of(name)))


@cache
def mentioned(name: str) -> set[str]:
    return {dotted(node) for node in ast.walk(tree_of(name)) if isinstance(node, ast.Attribute)} | imports_of(name)


def users_of(*prefixes: str) -> set[str]:
    return {name for name in NAMES if any(m == p or m.startswith(f"{p}.") for m in mentioned(name) for p in prefixes)}


def importers_of(library: str) -> set[str]:
    return {name for name in NAMES if any(i.split(".")[0] == library for i in imports_of(name))}


def test_typer_is_imported_by_the_command_line_only() -> None:
    assert all(name.startswith("cli/") for name in importers_of("typer"))
    assert importers_of("click") == set()


def test_h5py_is_imported_by_the_store_only() -> None:
    assert all(name.startswith(("store/", "exchange/layouts/")) for name in importers_of("h5py"))


def test_flash_attn_is_imported_by_its_adapter_only() -> None:
    assert importers_of("flash_attn") == {"model/attention/flash_attn.py"}


def test_cuda_streams_and_events_are_the_runners() -> None:
    streams = [f"torch.cuda.{name}" for name in ("Stream", "Event", "stream")]
    assert users_of(*streams) == {"engine/runner.py"}
    assert users_of("torch.cuda.current_stream") == {"engine/runner.py", "model/kernels/nvrtc.py"}  # launches itself


def test_the_environment_is_read_only_for_weights_for_batch_systems_and_for_the_driver() -> None:
    assert users_of("os.environ", "os.getenv", "os.putenv") == {"model/locate.py", "plan/shards.py", "waking.py"}


def test_processors_are_counted_in_one_place() -> None:
    assert users_of("os.cpu_count", "os.sched_getaffinity") == {"stopping.py"}


def test_fair_esm_is_an_oracle_and_a_peer_to_time_and_nothing_else() -> None:
    assert importers_of("esm") == {"validation/fair_esm.py", "validation/fair_esm_1.py", "benchmark/peers.py"}


def file_of(target: str) -> str | None:
    """The file of the package that an imported name stands in, or is; None for what is not of the package."""
    package, _, rest = target.partition(".")
    parts = rest.split(".") if package == "virnucpro_cli" else []
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in NAMES:
                return file
    return None


def files_imported_by(name: str) -> set[str]:
    """Wherever in the file the import stands."""
    return {file for target in imports_of(name) if (file := file_of(target)) not in (None, name)}


def package_of(name: str) -> str:
    return name.removesuffix(".py").split("/")[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__.py"])
def test_imports_point_to_packages_that_come_before(name: str) -> None:
    assert package_of(name) in ORDER, f"{name} has no place in the house: add its package to ORDER"
    allowed = ORDER[: ORDER.index(package_of(name)) + 1]
    assert {file for file in files_imported_by(name) if package_of(file) not in allowed} == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: files_imported_by(name) for name in NAMES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


MOST_OF_A_PLAIN_RUN = 47
"""Modules of the package that a plain `virnucpro embed` imports, at most: what a run is not asked for is not imported."""


def test_a_plain_run_imports_only_what_it_needs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKVLA\n")
    program = (
        "import sys\nfrom virnucpro_cli.cli import main\n"
        f"try: main(['embed', 'in.fasta', '-o', 'out.h5', '--model', {str(tiny_model)!r}, '--device', 'cpu', '-q'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sorted(name for name in sys.modules if name.startswith('virnucpro_cli')))"
    )
    found = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True).split()
    assert len(found) <= MOST_OF_A_PLAIN_RUN
    unasked = (
        "cluster",
        "exchange",
        "validation",
        "benchmark",
        "explore",
        "predict",
        "machine",
        "engine.workers",
        "engine.second_pass",
        "fasta.compressed",
        "model.kernels",
        "store.checked",
        "store.reader",
    )
    assert not [name for name in found if name.startswith(tuple(f"virnucpro_cli.{each}" for each in unasked))]
    assert [name for name in found if name.startswith("virnucpro_cli.features.")] == []
    homes = {f"virnucpro_cli.model.{row.module}" for row in families.TABLE.values()}
    assert homes.intersection(found) == {"virnucpro_cli.model.esm2"}


@pytest.mark.parametrize(
    "command",
    ["merge out.h5", "status out.h5", "export out.shard-0001-of-0002.h5 --to npy -o rows.npy",
     "inspect out.shard-0001-of-0002.h5 --qc qc.tsv --multiqc . --ro-crate .",
     "verify out.shard-0001-of-0002.h5 --fasta in.fasta"],
)  # fmt: skip
def test_what_reads_files_does_without_pytorch(command: str, tiny_model: Path, tmp_path: Path) -> None:
    """It takes seconds to import."""
    (tmp_path / "in.fasta").write_text(">a\nMKVLA\n>b\nMKV\n")
    for shard in ("1/2", "2/2"):
        embed_fasta(
            str(tmp_path / "in.fasta"), str(tmp_path / "out.h5"), model=str(tiny_model), device="cpu", shard=shard
        )
    program = f"import sys; sys.modules['torch'] = None\nfrom virnucpro_cli.cli import main; main({command.split()!r})"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


MOST_LINES, MOST_PARAMETERS = 60, 8
NO_SUBJECT = re.compile(r"(Of|Whose|Those|As|In|They|It|Its|What)\b")


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    """Every function but Triton's kernels, which take each pointer and stride as a parameter."""
    every = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for node in every if not any("jit" in ast.unparse(each) for each in node.decorator_list)]


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short_and_take_few_arguments(name: str) -> None:
    for function in functions_of(tree_of(name)):
        named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        count = len([each for each in named if each.arg not in ("self", "cls")])
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MOST_LINES and count <= MOST_PARAMETERS, f"{name}: {function.name}: {lines} lines, {count}"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_begin_with_their_subject(name: str) -> None:
    texts = [
        node.value.value
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert [text[:60] for text in texts if NO_SUBJECT.match(text)] == []
