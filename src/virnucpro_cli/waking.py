"""A GPU's context, and the processes of a run that has several: begun before PyTorch is read, which takes seconds."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket, socketpair
from threading import Thread
from typing import NamedTuple

from virnucpro_cli.processes import started

GPUS = Path("/proc/driver/nvidia/gpus")


def wake(device: str) -> None:
    """Begin to give the GPU of that name its context, in which PyTorch will find it. `auto` and `cuda` are the first.

    Nothing fails here: what is wrong with a device is told where it is chosen.
    """
    kind, _, number = device.partition(":")
    if kind in ("auto", "cuda"):
        first = number.partition(",")[0]
        Thread(target=_wake, args=(int(first) if first.isdecimal() else 0,), name="wake", daemon=True).start()


def _wake(number: int) -> None:
    with suppress(OSError, AttributeError):  # no driver of NVIDIA's
        driver = ctypes.CDLL("libcuda.so.1")
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as PyTorch does before its first call
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


class Begun(NamedTuple):
    """A process that reads its libraries and waits for its job. device: its name; channel: this process's end of it."""

    device: str
    process: "subprocess.Popen[bytes]"
    channel: socket


def begin(device: str) -> Begun:
    """A process for the device, which runs `engine.workers.main`. Raises OSError if the system has none to give."""
    ours, theirs = socketpair()
    with theirs:
        code = f"""
from virnucpro_cli.waking import wake
wake({device!r})
from virnucpro_cli.engine.workers import main
main({theirs.fileno()})
"""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        return Begun(device, started(code, [theirs.fileno()], **streams), ours)


def end(begun: list[Begun]) -> None:
    """End processes that have no job."""
    for each in begun:
        each.process.kill()
        each.channel.close()
        each.process.wait()


@contextmanager
def begun_for(device: str, workers: int | str) -> Iterator[list[Begun]]:
    """Processes for a run with these options, if it has several. Those that nobody takes end with the context."""
    names, begun = expected(device, workers), list[Begun]()
    try:
        with suppress(OSError):  # it is told where they are needed
            for name in names if len(names) > 1 else ():
                begun.append(begin(name))
        yield begun
    finally:
        end(begun)


def expected(device: str, workers: int | str) -> Sequence[str]:
    """The devices of a run's processes, by name, as far as they are known without PyTorch: see `resolve_devices`."""
    kind, _, numbers = device.partition(":")
    names = ["cpu"] if kind == "cpu" else []
    if kind in ("auto", "cuda"):
        names = [f"cuda:{each.strip()}" for each in numbers.split(",") if each.strip()] if numbers else _visible()
    return [names[i % len(names)] for i in range(len(names) if workers == "auto" else int(workers))] if names else []


def _visible() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    return [f"cuda:{i}" for i in range(count if visible is None else min(count, len(visible.split(","))))]
