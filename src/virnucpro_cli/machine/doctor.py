"""The doctor workflow: what a run would find on this machine, and a remedy for everything that would stand in its way."""

import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import virnucpro_cli
from virnucpro_cli import report, store
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, install_command
from virnucpro_cli.model import attention, locate
from virnucpro_cli.model.spec import SIZES
from virnucpro_cli.plan import shards
from virnucpro_cli.store import disk

DRIVER = Path("/proc/driver/nvidia/version")
LITTLE_ROOM = 1e9
TIERS = (((8, 0), "promised"), ((5, 0), "best effort"), ((0, 0), "refused"))


@dataclass(frozen=True)
class Finding:
    """remedy: what to do about it; empty if nothing is wrong."""

    what: str
    found: str
    remedy: str = ""


def check_machine() -> bool:
    """Print what is found to standard output; whether nothing stands in the way of a run."""
    out = report.stdout()
    findings = list(look())
    table = report.facts_table("What a run would find here")
    for finding in findings:
        table.add_row(finding.what, f"{finding.found}\n-> {finding.remedy}" if finding.remedy else finding.found)
    out.print(table)
    wrong = [finding.what for finding in findings if finding.remedy]
    out.print(f"to see to: {', '.join(dict.fromkeys(wrong))}" if wrong else "nothing stands in the way")
    return not wrong


def look() -> Iterator[Finding]:
    yield Finding(
        "virnucpro", f"{virnucpro_cli.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    yield from _torch_and_driver()
    yield from _devices()
    yield from _weights()
    yield from _room()
    yield from _batch_system()


def _torch_and_driver() -> Iterator[Finding]:
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.is_file() else None
    remedy = ""
    if driver and build == "CPU":
        remedy = "There is an NVIDIA driver and this PyTorch cannot use it: install a CUDA build (see pytorch.org)."
    elif torch.version.cuda and not torch.cuda.is_available():
        remedy = (
            "No GPU can be used: the driver may be too old for this CUDA (nvidia-smi shows which it supports), or none is given "
            "to this job or container (CUDA_VISIBLE_DEVICES, --gres, --gpus)."
            if driver
            else ""
        )
    yield Finding("PyTorch", f"{torch.__version__}, a {build} build", remedy)
    yield Finding("NVIDIA driver", driver[0] if driver else "none")


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    for number in range(count):
        device = torch.device("cuda", number)
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
        yield Finding(
            str(device),
            f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]} ({tier}), "
            f"{report.size(free)} of {report.size(total)} free",
            remedy,
        )
    try:
        each, notes = devices.resolve_devices("auto", "auto")
    except UserError as error:
        yield Finding("a run uses", error.what, error.remedy or "Name a --device.")
        return
    device = each[0]
    dtype = devices.resolve_dtype("auto", device)
    backend = attention.resolve("auto", device, dtype)
    yield Finding(
        "a run uses", f"{len(each)} x {devices.describe_device(device)}, {attention.describe(dtype)}, attention {backend.name}",
        "; ".join([*notes, *backend.notes]),
    )  # fmt: skip
    for name in attention.BACKENDS:
        if name != backend.name and not any(name in note for note in backend.notes):
            try:
                attention.resolve(name, device, dtype)
                why = "would run, and is not the first choice"
            except UserError as error:
                why = error.what.partition("cannot run here: ")[2] or error.what
            yield Finding(f"attention {name}", why)
    yield Finding(
        "host memory",
        f"{report.size(devices.free_memory(torch.device('cpu')))} free, {devices.describe_device(torch.device('cpu')).removeprefix('CPU, ')}",
    )


def _weights() -> Iterator[Finding]:
    for spec in SIZES.values():
        try:
            found = locate.locate(spec.name)
        except UserError as error:
            yield Finding(f"weights {spec.name}", error.what, error.remedy)
            continue
        absent = f"not here; embed fetches them, or ahead of time: virnucpro fetch {spec.name}"
        yield Finding(f"weights {spec.name}", found.place if found else absent)
    try:
        cache = locate.cache_dir()
    except UserError as error:
        yield Finding("cache", error.what, error.remedy)
        return
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    writable = os.access(nearest, os.W_OK | os.X_OK)
    yield Finding(
        "cache",
        str(cache),
        "" if writable else f"{nearest} cannot be written: set XDG_CACHE_HOME to a folder that can.",
    )


def _room() -> Iterator[Finding]:
    places = {"this folder": Path.cwd(), "temporary folder": Path(tempfile.gettempdir())}
    for what, folder in places.items():
        free = store.free_space(folder / "any")
        remedy = ""
        if not os.access(folder, os.W_OK | os.X_OK):
            remedy = "It cannot be written: " + ("give another -o." if what == "this folder" else "set TMPDIR.")
        elif free < LITTLE_ROOM:
            remedy = "Little room: " + (
                "choose another disk with -o." if what == "this folder" else "set TMPDIR to another disk."
            )
        elif what == "this folder" and not _has_locks(folder):
            remedy = "It has no file locks: never write one output from two runs at once, or give another -o."
        yield Finding(what, f"{folder}, {report.size(free)} free", remedy)
    lacking = [name for name in ("matplotlib",) if importlib.util.find_spec(name) is None]
    if lacking:
        yield Finding("bench --plot", f"cannot draw: matplotlib is not installed ({install_command('plots')})")


def _has_locks(folder: Path) -> bool:
    with suppress(OSError, UserError):
        return disk.has_locks(folder)
    return False


def _batch_system() -> Iterator[Finding]:
    name = shards.scheduler_here()
    if name is None:
        yield Finding("array job", "none")
        return
    try:
        yield Finding("array job", f"{name}: --shard auto is --shard {shards.parse('auto')}")
    except UserError as error:
        yield Finding("array job", f"{name}: {error.what}", error.remedy)
