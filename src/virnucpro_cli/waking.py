"""A GPU's context, made by the driver while Python still reads PyTorch: either takes about a second."""

import ctypes
import os
from contextlib import suppress
from threading import Thread


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
