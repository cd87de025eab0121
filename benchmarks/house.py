"""The size and shape of the sources, as one table: `python benchmarks/house.py [CHECKOUT ...]`, one column a checkout.

Counts come from the syntax trees; only the modules of a plain run are counted by running `virnucpro embed`.
"""

import ast
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ARRAY = re.compile(r"\b(ndarray|NDArray|Tensor|Array|Rows)\b")
SHAPE = re.compile(r"\[[\w.+*/ -]+(?:,[\w.+*/ -]+)*\]|\((?:[\w.+*/ -]+,)[\w.,+*/ -]*\)|\bscalar\b")
DTYPE = re.compile(r"\b(u?int(8|16|32|64)|float(16|32|64)|bool|fp16|fp32|bf16|bytes|dtypes?|uint)\b")
PLAIN_RUN = (
    "import sys\nfrom virnucpro_cli.cli import {main}\n"
    "sys.argv = ['virnucpro', 'embed', 'in.fasta', '-o', 'out.h5', '--model', 'demo', '--device', 'cpu', '-q']\n"
    "try: {main}()\nexcept SystemExit as end: assert not end.code\n"
    "print(*[name for name in sys.modules if name.startswith('virnucpro_cli')])"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(function: Function) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([each for each in named if each.arg not in ("self", "cls")])


def lines_of(function: Function) -> int:
    first = min([function.lineno, *[each.lineno for each in function.decorator_list]])
    return (function.end_lineno or first) - first + 1


def annotations(function: Function) -> str:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg]
    notes = [each.annotation for each in named if each and each.annotation] + [function.returns]
    return " ".join(ast.unparse(note) for note in notes if note)


def is_kernel(function: Function) -> bool:
    """Triton takes every pointer and stride of a kernel as a parameter."""
    return any("jit" in ast.unparse(each) for each in function.decorator_list)


def functions(trees: dict[str, ast.Module]) -> Iterator[tuple[str, Function]]:
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}::{node.name}", node


def outer(tree: ast.Module) -> set[Function]:
    """Functions of the module and of its classes, without those inside functions."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    return {node for body in bodies for node in body if isinstance(node, Function)}


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(target: str, trees: dict[str, ast.Module]) -> str | None:
    parts = target.split(".")[1:] if target.startswith("virnucpro_cli") else []
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in trees:
                return file
    return None


def circles(imports: dict[str, set[str]]) -> int:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError:
        return 1
    return 0


def modules_of_a_plain_run(source: Path) -> str:
    main = "main" if "def main" in (source / "virnucpro_cli/cli/__init__.py").read_text() else "app"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.fasta").write_text(">a\nMKVLA\n")
        program = f"import sys; sys.path.insert(0, {str(source)!r})\n" + PLAIN_RUN.format(main=main)
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, text=True, capture_output=True)
    return str(len(done.stdout.split())) if done.returncode == 0 else "failed"


def measures(checkout: Path) -> dict[str, str]:
    """Figures of one checkout, each under its name."""
    package = checkout / "src" / "virnucpro_cli"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}
    trees = {name: ast.parse(text) for name, text in sources.items()}
    imports = {
        name: {file for target in imported(tree) if (file := file_of(target, trees)) not in (None, name)}
        for name, tree in trees.items()
    }
    room = {name: name.removesuffix(".py").split("/")[0] for name in trees}
    arrows = {(room[name], room[to]) for name, all_of in imports.items() for to in all_of if room[name] != room[to]}
    every = list(functions(trees))
    long = [name for name, function in every if lines_of(function) > 60]
    wide = [name for name, function in every if parameters(function) > 8 and not is_kernel(function)]
    public = {f for tree in trees.values() for f in outer(tree) if not f.name.startswith("_") and not is_kernel(f)}
    arrays = [f for f in public if ARRAY.search(annotations(f))]
    told = [each for each in arrays if SHAPE.search(note := ast.get_docstring(each) or "") and DTYPE.search(note)]
    return {
        "rooms at the top level": str(len({each for each in room.values() if not each.startswith("__")})),
        "import arrows between rooms": str(len(arrows)),
        "circles, by file": str(circles(imports)),
        "modules of a plain embed": modules_of_a_plain_run(checkout / "src"),
        "lines of src": str(sum(text.count("\n") for text in sources.values())),
        "functions over 60 lines": " ".join([str(len(long)), *long[:4]]),
        "functions with more than 8 parameters, kernels aside": " ".join([str(len(wide)), *wide[:6]]),
        "most parameters, kernels aside": str(max(parameters(f) for _, f in every if not is_kernel(f))),
        "median lines of a function": str(int(statistics.median(lines_of(function) for _, function in every))),
        "public array functions with shapes and dtypes": f"{len(told)} of {len(arrays)}",
        "lines of the README": str((checkout / "README.md").read_text().count("\n")),
    }


def main() -> None:
    checkouts = [Path(each).resolve() for each in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [measures(each) for each in checkouts]
    print("| |", " | ".join(each.name for each in checkouts), "|")
    print("|---|" + "---|" * len(checkouts))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(column[name] for column in columns), "|")


if __name__ == "__main__":
    main()
