"""GPUs that are here whatever PyTorch says, why this PyTorch cannot use them, and how that is put right here."""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from virnucpro_cli.errors import made_by_uv

LEAST_DRIVER = {12: 525, 13: 580}
"""The oldest NVIDIA driver that runs programs of a CUDA version (NVIDIA's table of minor version compatibility)."""


class Place(NamedTuple):
    """Where to look: the root of the file system, Python's environment, and the search path (None: this process's)."""

    root: Path = Path("/")
    prefix: Path = Path(sys.prefix)
    programs: str | None = None


HERE = Place()


class Build(NamedTuple):
    """A build of PyTorch. archs: what it has code for, such as sm_80; capability: of the GPU that it finds, if any."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    archs: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        return f"CUDA {self.cuda}" if self.cuda else f"ROCm {self.hip}" if self.hip else "CPU"


class Unusable(NamedTuple):
    """A GPU that PyTorch cannot use. why: what stands between them; remedy: what puts it right."""

    why: str
    remedy: str


def this_build() -> Build:
    build = Build(torch.__version__, torch.version.cuda, torch.version.hip)
    if not torch.cuda.is_available():
        return build
    return build._replace(archs=tuple(torch.cuda.get_arch_list()), capability=torch.cuda.get_device_capability())


def nvidia_driver(place: Place) -> str:
    """The version of NVIDIA's driver in the kernel, or nothing. A container sees it even if it was given no GPU."""
    file = place.root / "proc/driver/nvidia/version"
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.is_file() else None
    return found[0] if found else ""


def unusable(build: Build, place: Place) -> Unusable | None:
    """Why a GPU that is here cannot be used by this PyTorch; None if it can, or if there is no GPU."""
    if build.capability is not None:
        return None if build.hip or has_code(build.archs, build.capability) else _no_code(build, place)
    nodes, driver = any((place.root / "dev").glob("nvidia[0-9]*")), nvidia_driver(place)
    if nodes or driver or _is_listed(place):
        if build.cuda:
            return _too_old(build, driver, place) or _not_given(build, nodes, place)
        return Unusable(_told("An NVIDIA GPU", build, "cannot use it"), another_build(place))
    if (place.root / "dev/kfd").exists() and not build.hip:
        return Unusable(_told("An AMD GPU", build, "cannot use it"), another_build(place, maker="AMD"))
    return None


def has_code(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a build runs on a GPU: binaries of its major version and no newer minor one, or PTX that is no newer."""
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(archs)):
        built = int(major), int(minor)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not archs


def container(place: Place) -> str:
    """`apptainer` (Singularity, too), `docker` (Podman, too), or nothing outside of containers."""
    if (place.root / ".singularity.d").exists():
        return "apptainer"
    return "docker" if any((place.root / name).exists() for name in (".dockerenv", "run/.containerenv")) else ""


def another_build(place: Place, older_cuda: bool = False, maker: str = "NVIDIA") -> str:
    """How a build of PyTorch for the GPU is had here: by an image, in a conda environment, or in another one.

    older_cuda: the build must be for CUDA 12.
    """
    conda = (place.prefix / "conda-meta").is_dir() and maker == "NVIDIA"
    packages = f"conda install -c conda-forge pytorch-gpu 'cuda-version{'=12' if older_cuda else '>=12'}'"
    backend = "cu126" if older_cuda else "cu130" if maker == "NVIDIA" else "rocm7.1"
    if container(place):
        of_packages = f"; if its packages are conda's, add {packages.rpartition('forge ')[2]}" if conda else ""
        return f"Take an image with such a build: packaging/container of the source, TORCH={backend}{of_packages}."
    if conda:
        return f"Install such a build: {packages}"
    uv = "uv pip install" if made_by_uv(place.prefix) else "pip install uv && uv pip install"
    backend = backend if older_cuda else "auto"
    return f"Install such a build: {uv} --torch-backend {backend} --reinstall-package torch torch"


def _told(gpu: str, build: Build, trouble: str) -> str:
    return f"{gpu} is here, and this PyTorch ({build.version}, a {build.kind} build) {trouble}."


def _is_listed(place: Place) -> bool:
    """Whether nvidia-smi is there and lists a GPU. It ends with an error where no driver answers."""
    program = shutil.which("nvidia-smi", path=place.programs)
    if program is None:
        return False
    with suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
        return not listed.returncode and "GPU" in listed.stdout
    return False


def _too_old(build: Build, driver: str, place: Place) -> Unusable | None:
    """A driver that does not run programs of this CUDA; None if it does, or is not known."""
    least, has = LEAST_DRIVER.get(int(str(build.cuda).partition(".")[0]), 0), int(driver.partition(".")[0] or 10**6)
    if has >= least:
        return None
    why = _told("An NVIDIA GPU", build, f"cannot use it: driver {driver} is too old, it takes {least} or newer")
    if has < min(LEAST_DRIVER.values()):
        return Unusable(why, f"Install driver {min(LEAST_DRIVER.values())} or newer.")
    return Unusable(why, f"{another_build(place, older_cuda=True)} (or install a newer driver)")


def _not_given(build: Build, nodes: bool, place: Place) -> Unusable:
    inside = "" if nodes else container(place)
    if inside:
        why = _told("An NVIDIA GPU", build, "cannot use it: none is given to this container")
        flag = "docker run --gpus all" if inside == "docker" else "apptainer run --nv"
        return Unusable(why, f"Start the container by {flag}.")
    asked = "Ask the batch system for one (--gres=gpu:1 of Slurm), and see to CUDA_VISIBLE_DEVICES."
    why = _told("An NVIDIA GPU", build, "cannot use it: none is given to this process")
    return Unusable(why, f"{asked} If nvidia-smi fails, too, install the driver anew.")


def _no_code(build: Build, place: Place) -> Unusable:
    major, minor = build.capability or (0, 0)
    why = _told(f"A GPU of compute capability {major}.{minor}", build, "has no code for it")
    return Unusable(why, another_build(place, older_cuda=major < 8))
