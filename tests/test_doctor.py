"""What doctor says of a machine, and of one with something wrong."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from virnucpro_cli import cli
from virnucpro_cli.engine import devices
from virnucpro_cli.machine import doctor


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


def test_a_driver_that_this_pytorch_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Jan  1\n")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build" in remedies()["PyTorch"] and found("NVIDIA driver") == "580.159.04"


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
    monkeypatch.setattr(doctor, "os", SimpleNamespace(access=lambda *_: True, W_OK=2, X_OK=1))
    assert "another disk" in remedies()["this folder"] and "TMPDIR" in remedies()["temporary folder"]
    monkeypatch.setattr(doctor, "os", SimpleNamespace(access=lambda *_: False, W_OK=2, X_OK=1))
    assert "XDG_CACHE_HOME" in remedies()["cache"] and "cannot be written" in remedies()["this folder"]


def test_the_task_of_an_array_job_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("array job") == "none"
    for variable, value in (("ID", "7"), ("MIN", "1"), ("MAX", "40"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{variable}", value)
    assert found("array job") == "Slurm: --shard auto is --shard 7/40"
    monkeypatch.delenv("SLURM_ARRAY_TASK_MAX")
    assert "auto/40" in remedies()["array job"]
