"""The doctor workflow: what a run would find on this machine, and a remedy for everything that stands in its way."""

import importlib.util
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import virnucpro_cli
from virnucpro_cli import report, store
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, install_command
from virnucpro_cli.machine import gpus
from virnucpro_cli.model import attention, locate
from virnucpro_cli.model.families import SIZES, short_name
from virnucpro_cli.plan import shards
from virnucpro_cli.store import disk

GPU = "a GPU that PyTorch cannot use"
LITTLE_ROOM = 1e9
TIERS = (((8, 0), "promised"), ((5, 0), "best effort"), ((0, 0), "refused"))


class Finding(NamedTuple):
    """remedy: what to do about it; empty if nothing is wrong."""

    what: str
    found: str
    remedy: str = ""


def check_machine(place: gpus.Place = gpus.HERE) -> bool:
    """Print what is seen to standard output; whether nothing stands in the way of a run.

    A GPU that PyTorch cannot use comes before the table, since a run on the CPU would be slow and not wrong.
    """
    out = report.stdout()
    findings = list(look(place))
    table = report.facts_table("What a run would find here")
    for what, seen, remedy in findings:
        if what == GPU:
            out.print(f"{seen}\n-> {remedy}", soft_wrap=True, markup=False, highlight=False)
        else:
            table.add_row(what, f"{seen}\n-> {remedy}" if remedy else seen)
    out.print(table)
    wrong = dict.fromkeys(finding.what for finding in findings if finding.remedy)
    out.print(f"to see to: {', '.join(wrong)}" if wrong else "nothing stands in the way")
    return not wrong


def look(place: gpus.Place = gpus.HERE) -> Iterator[Finding]:
    python = f"Python {platform.python_version()}, {platform.platform()}"
    yield Finding("virnucpro", f"{virnucpro_cli.__version__}, {python}")
    yield from _torch_and_driver(place)
    for number in range(torch.cuda.device_count()):
        yield _gpu(torch.device("cuda", number))
    yield from _choices()
    yield from _weights()
    yield _cache()
    yield _room("this folder", Path.cwd(), "give another -o.", "choose another disk with -o.")
    yield _room("temporary folder", Path(tempfile.gettempdir()), "set TMPDIR.", "set TMPDIR to another disk.")
    if importlib.util.find_spec("matplotlib") is None:
        yield Finding("bench --plot", f"cannot draw: matplotlib is not installed ({install_command('plots')})")
    yield _tried("array job", _array_job)


def _tried(what: str, call: Callable[[], str]) -> Finding:
    try:
        return Finding(what, call())
    except UserError as error:
        return Finding(what, error.what, error.remedy)


def _torch_and_driver(place: gpus.Place) -> Iterator[Finding]:
    build = gpus.this_build()
    if (trouble := gpus.unusable(build, place)) is not None:
        yield Finding(GPU, *trouble)
    yield Finding("PyTorch", f"{build.version}, a {build.kind} build")
    yield Finding("NVIDIA driver", gpus.nvidia_driver(place) or "none")


def _gpu(device: torch.device) -> Finding:
    capability = torch.cuda.get_device_capability(device)
    tier = next(name for least, name in TIERS if capability >= least)
    if torch.version.hip is not None:
        tier = "best effort"
    free, total = torch.cuda.mem_get_info(device)
    remedy = ""
    if tier == "refused":
        remedy = "Too old: use --device cpu, or other GPUs by --device cuda:N,N."
    elif free < total / 2:
        remedy = "Something else fills it: see nvidia-smi, or leave it out by --device cuda:N,N."
    level = f"compute capability {capability[0]}.{capability[1]} ({tier})"
    room = f"{report.size(free)} of {report.size(total)} free"
    return Finding(str(device), f"{torch.cuda.get_device_name(device)}, {level}, {room}", remedy)


def _choices() -> Iterator[Finding]:
    """Devices, dtype and backend that a run would choose, why it would take no other backend, and the host's memory."""
    try:
        each, notes = devices.resolve_devices("auto", "auto")
    except UserError as error:
        yield Finding("a run uses", error.what, error.remedy or "Name a --device.")
        return
    device, cpu = each[0], torch.device("cpu")
    dtype = devices.resolve_dtype("auto", device)
    backend = attention.resolve("auto", device, dtype)
    used = f"{len(each)} x {devices.describe_device(device)}, {attention.describe(dtype)}, attention {backend.name}"
    yield Finding("a run uses", used, "; ".join([*notes, *backend.notes]))
    for name in attention.BACKENDS:
        if name != backend.name and not any(name in note for note in backend.notes):
            try:
                attention.resolve(name, device, dtype)
                why = "would run, and is not the first choice"
            except UserError as error:
                why = error.what.partition("cannot run here: ")[2] or error.what
            yield Finding(f"attention {name}", why)
    threads = devices.describe_device(cpu).removeprefix("CPU, ")
    yield Finding("host memory", f"{report.size(devices.free_memory(cpu))} free, {threads}")


def _weights() -> Iterator[Finding]:
    """A line for each model that is here, or is here in part, and one for all others."""
    elsewhere = []
    for spec in SIZES.values():
        finding = _tried(f"weights {spec.name}", lambda name=spec.name: _place(name))  # type: ignore[misc]
        if finding.found:
            yield finding
        else:
            elsewhere.append(short_name(spec))
    if elsewhere:
        how = "embed fetches them, or ahead of time: virnucpro fetch NAME; virnucpro models shows their licences"
        yield Finding("weights not here", f"{', '.join(elsewhere)}; {how}")


def _place(name: str) -> str:
    weights = locate.locate(name)
    return weights.place if weights else ""


def _cache() -> Finding:
    try:
        cache = locate.cache_dir()
    except UserError as error:
        return Finding("cache", error.what, error.remedy)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    refused = f"{nearest} cannot be written: set XDG_CACHE_HOME to a folder that can."
    return Finding("cache", str(cache), "" if _writable(nearest) else refused)


def _room(what: str, folder: Path, elsewhere: str, another_disk: str) -> Finding:
    free, remedy = store.free_space(folder / "any"), ""
    if not _writable(folder):
        remedy = f"It cannot be written: {elsewhere}"
    elif free is not None and free < LITTLE_ROOM:
        remedy = f"Little room: {another_disk}"
    elif what == "this folder" and not _has_locks(folder):
        remedy = "It has no file locks: never write one output from two runs at once, or give another -o."
    room = "which does not say how much is free" if free is None else f"{report.size(free)} free"
    return Finding(what, f"{folder}, {room}", remedy)


def _writable(folder: Path) -> bool:
    """Whether a file can be made there: permissions do not tell it of every file system."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder):
        return True
    return False


def _has_locks(folder: Path) -> bool:
    with suppress(OSError, UserError):
        return disk.has_locks(folder)
    return False


def _array_job() -> str:
    name = shards.scheduler_here()
    if name is None:
        return "none"
    try:
        return f"{name}: --shard auto is --shard {shards.parse('auto')}"
    except UserError as error:
        raise UserError(f"{name}: {error.what}", error.remedy) from None
