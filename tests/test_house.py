"""The arrows of DESIGN section 2: imports point downward, and each heavy library has one home."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "src" / "virnucpro_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    ("config", "kinds", "report", "errors", "stopping", "scratch"),
    ("fasta", "alphabet", "tables", "plan", "store", "model", "engine"),
    ("machine", "features"),
    ("cluster", "embed"),
    ("exchange", "validation"),
    ("benchmark", "explore"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


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


def mentioned(tree: ast.Module) -> set[str]:
    return {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imported(tree))


TREES = {name_of(path): ast.parse(path.read_text()) for path in FILES}


def users_of(*prefixes: str) -> set[str]:
    return {
        name
        for name, tree in TREES.items()
        if any(m == p or m.startswith(f"{p}.") for m in mentioned(tree) for p in prefixes)
    }


def importers_of(library: str) -> set[str]:
    return {name for name, tree in TREES.items() if any(i.split(".")[0] == library for i in imported(tree))}


def test_typer_is_imported_by_the_command_line_only() -> None:
    assert all(name.startswith("cli/") for name in importers_of("typer"))
    assert importers_of("click") == set()


def test_h5py_is_imported_by_the_store_only() -> None:
    assert all(name.startswith(("store/", "exchange/layouts/")) for name in importers_of("h5py"))


def test_flash_attn_is_imported_by_its_adapter_only() -> None:
    assert importers_of("flash_attn") == {"model/attention/flash_attn.py"}


def test_cuda_streams_and_events_are_the_runners() -> None:
    streams = [f"torch.cuda.{name}" for name in ("Stream", "Event", "stream", "current_stream")]
    assert users_of(*streams) == {"engine/runner.py"}


def test_the_environment_is_read_only_for_weights_and_for_batch_systems() -> None:
    assert users_of("os.environ", "os.getenv", "os.putenv") == {"model/locate.py", "plan/shards.py"}


def test_fair_esm_is_the_oracle_and_a_peer_to_time_and_nothing_else() -> None:
    assert importers_of("esm") == {"validation/reference.py", "benchmark/peers.py"}


@pytest.mark.parametrize("name", [name for name in TREES if name != "__init__.py"])
def test_imports_point_downward(name: str) -> None:
    part = name.removesuffix(".py").split("/")[0]
    assert part in LEVEL, f"{name} has no place in the house: add it to LAYERS"
    for target in imported(TREES[name]):
        package, _, rest = target.partition(".")
        first = rest.split(".")[0]
        if package == "virnucpro_cli" and first in LEVEL:
            assert LEVEL[first] <= LEVEL[part], f"{name} imports {target}, which stands above it"


def files_imported(name: str) -> set[str]:
    """Files of the package that a file imports when it is imported itself; a package's own file where nothing in it is named further."""
    found = set()
    at_once = ast.Module([node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for target in imported(at_once):
        package, _, rest = target.partition(".")
        parts = rest.split(".") if package == "virnucpro_cli" else []
        for depth in range(len(parts), 0, -1):
            path = "/".join(parts[:depth])
            file = next((each for each in (f"{path}.py", f"{path}/__init__.py") if each in TREES), None)
            if file is not None:
                found.add(file)
                break
    return found - {name}


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {name: files_imported(name) for name in TREES}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert set(left) == set()
