"""What doctor says of a machine, and of one with something wrong."""

from pathlib import Path

import pytest
import torch

from virnucpro_cli import cli
from virnucpro_cli.engine import devices
from virnucpro_cli.machine import doctor, gpus


@pytest.fixture(autouse=True)
def no_array_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_ARRAY_TASK_ID", "SGE_TASK_ID", "LSB_JOBINDEX", "PBS_ARRAY_INDEX", "PBS_ARRAYID"):
        monkeypatch.delenv(variable, raising=False)


def remedies() -> dict[str, str]:
    return {finding.what: finding.remedy for finding in doctor.look() if finding.remedy}


def found(what: str) -> str:
    return next(finding.found for finding in doctor.look() if finding.what == what)


def test_doctor_shows_what_a_run_would_use_and_where_things_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    out = capsys.readouterr().out
    for words in (
        "PyTorch",
        torch.__version__,
        "a run uses",
        "attention",
        "weights",
        "650M",
        "esmc-600m",
        "this folder",
        "array job",
    ):
        assert words in out, words
    assert (ended.value.code, "nothing stands in the way" in out) in ((0, True), (1, False))


CPU = gpus.Build("2.13.0+cpu")
CUDA = gpus.Build("2.13.0+cu130", cuda="13.0")
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  %s.159.04  Tue Jan  1\n"


@pytest.fixture
def place(tmp_path: Path) -> gpus.Place:
    """A machine without a GPU, a virtual environment, and no programs."""
    for folder in ("root/dev", "root/proc", "env", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    return gpus.Place(tmp_path / "root", tmp_path / "env", str(tmp_path / "bin"))


def with_driver(place: gpus.Place, major: int = 580) -> gpus.Place:
    version = place.root / "proc" / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text(DRIVER % major)
    return place


def with_files(place: gpus.Place, *names: str) -> gpus.Place:
    for name in names:
        (place.root / name).parent.mkdir(parents=True, exist_ok=True)
        (place.root / name).touch()
    return place


def with_smi(place: gpus.Place, script: str) -> gpus.Place:
    program = Path(place.programs or "") / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return place


def told(build: gpus.Build, place: gpus.Place) -> gpus.Unusable:
    trouble = gpus.unusable(build, place)
    assert trouble is not None
    return trouble


def test_the_first_line_names_a_gpu_that_pytorch_cannot_use(
    place: gpus.Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver beside the PyTorch of these tests, which finds no GPU by it; doctor fails, and says it once."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that PyTorch uses")
    assert not doctor.check_machine(with_driver(place))
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("An NVIDIA GPU is here, and this PyTorch") and torch.__version__ in first
    assert second.startswith("-> ") and first not in "\n".join(rest)
    assert doctor.GPU in rest[-1] and any("580.159.04" in line for line in rest)


def test_a_machine_without_a_gpu_needs_no_other_pytorch(place: gpus.Place, capsys: pytest.CaptureFixture[str]) -> None:
    with_smi(place, "echo no devices were found; exit 6")  # the program is there, and no driver answers it
    for build in (CPU, CUDA):
        assert gpus.unusable(build, place) is None
    doctor.check_machine(place)
    assert doctor.GPU not in capsys.readouterr().out


def test_each_sign_of_a_gpu_is_enough(place: gpus.Place) -> None:
    nodes = with_files(place._replace(root=place.root / "nodes"), "dev/nvidia0", "dev/nvidiactl")
    driver = with_driver(place._replace(root=place.root / "driver"))
    amd = with_files(place._replace(root=place.root / "amd"), "dev/kfd")
    for each, maker in ((nodes, "NVIDIA"), (driver, "NVIDIA"), (amd, "AMD")):
        why, remedy = told(CPU, each)
        assert why == f"An {maker} GPU is here, and this PyTorch (2.13.0+cpu, a CPU build) cannot use it."
        assert "--torch-backend auto" in remedy
    assert gpus.unusable(CPU, place) is None
    assert gpus.unusable(gpus.Build("2.13.0+rocm7.1", hip="7.1"), amd) is None
    assert "a ROCm 7.1 build" in told(gpus.Build("2.13.0+rocm7.1", hip="7.1"), nodes).why
    assert "NVIDIA" in told(CPU, with_smi(place, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")).why


def test_remedies_fit_where_python_runs(place: gpus.Place) -> None:
    with_driver(place)
    assert "pip install uv && uv pip install" in told(CPU, place).remedy
    (place.prefix / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert ": uv pip install" in told(CPU, place).remedy
    (place.prefix / "conda-meta").mkdir()
    in_conda = told(CPU, place).remedy
    assert "conda install -c conda-forge pytorch-gpu 'cuda-version>=12'" in in_conda and "pip" not in in_conda
    with_files(place, ".dockerenv")
    in_docker = told(CPU, place).remedy
    assert "packaging/container" in in_docker and "TORCH=cu130" in in_docker and "conda install" not in in_docker
    assert "pytorch-gpu" in in_docker
    (place.prefix / "conda-meta").rmdir()
    assert "pytorch-gpu" not in told(CPU, place).remedy


def test_a_container_that_was_given_no_gpu_is_told_from_a_job_without_one(place: gpus.Place) -> None:
    with_driver(place)
    assert "given to this process" in told(CUDA, place).why and "--gres" in told(CUDA, place).remedy
    with_files(place, "run/.containerenv")
    assert "none is given to this container" in told(CUDA, place).why and "--gpus all" in told(CUDA, place).remedy
    with_files(place, ".singularity.d/runscript")
    assert "apptainer run --nv" in told(CUDA, place).remedy
    with_files(place, "dev/nvidia0")
    assert "given to this process" in told(CUDA, place).why


def test_a_driver_too_old_for_the_build_is_named_with_what_it_takes(place: gpus.Place) -> None:
    with_driver(place, 535)
    why, remedy = told(CUDA, place)
    assert "driver 535.159.04 is too old, it takes 580 or newer" in why and "--torch-backend cu126" in remedy
    assert "too old" not in told(gpus.Build("2.13.0+cu126", cuda="12.6"), place).why
    (place.prefix / "conda-meta").mkdir()
    assert "pytorch-gpu 'cuda-version=12'" in told(CUDA, place).remedy
    with_files(place, ".singularity.d/runscript")
    assert "TORCH=cu126" in told(CUDA, place).remedy
    (place.root / "proc/driver/nvidia/version").write_text(DRIVER % 470)
    assert told(CUDA, place).remedy == "Install driver 525 or newer."


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [("sm_75 sm_80 sm_90", (9, 0), True), ("sm_75 sm_80 sm_90", (8, 9), True), ("sm_75 sm_80", (7, 0), False),
     ("sm_80 sm_90", (12, 0), False), ("sm_80 compute_90", (12, 0), True), ("sm_86", (8, 0), False), ("sm_90a", (9, 0), True)],
)  # fmt: skip
def test_a_build_without_code_for_the_gpu_is_named(
    place: gpus.Place, archs: str, capability: tuple[int, int], runs: bool
) -> None:
    trouble = gpus.unusable(CUDA._replace(archs=tuple(archs.split()), capability=capability), place)
    assert (trouble is None) == runs
    if trouble is not None:
        assert f"compute capability {capability[0]}.{capability[1]}" in trouble.why
        assert ("cu126" in trouble.remedy) == (capability[0] == 7)


@pytest.mark.parametrize(
    ("capability", "free", "tier", "words"),
    [((9, 0), 70, "promised", ""), ((7, 5), 70, "best effort", ""), ((3, 7), 70, "refused", "Too old"),
     ((8, 0), 20, "promised", "Something else fills it")],
)  # fmt: skip
def test_gpus_are_shown_with_their_tier_and_who_fills_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, tier: str, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**9, 80 * 10**9))
    monkeypatch.setattr(devices, "resolve_devices", lambda *_: ([torch.device("cpu")], []))
    assert f"({tier})" in found("cuda:0") and words in remedies().get("cuda:0", "")


def test_a_full_disk_and_a_cache_that_cannot_be_written_have_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.store, "free_space", lambda path: 5 * 10**6)
    assert "another disk" in remedies()["this folder"] and "TMPDIR" in remedies()["temporary folder"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # root has the permission, and no file can be made there
    monkeypatch.chdir("/proc")
    assert "XDG_CACHE_HOME" in remedies()["cache"] and "cannot be written" in remedies()["this folder"]


def test_the_task_of_an_array_job_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("array job") == "none"
    for variable, value in (("ID", "7"), ("MIN", "1"), ("MAX", "40"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{variable}", value)
    assert found("array job") == "Slurm: --shard auto is --shard 7/40"
    monkeypatch.delenv("SLURM_ARRAY_TASK_MAX")
    assert "auto/40" in remedies()["array job"]
