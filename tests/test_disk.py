"""File systems that do not have a call: what each run does then, for each error that they have been seen to give."""

import errno
import os
import signal
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_faults import datasets
from virnucpro_cli import cli, store
from virnucpro_cli import embed as embed_workflow
from virnucpro_cli.cli import extract
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.machine import doctor
from virnucpro_cli.model import locate
from virnucpro_cli.report import RunReport
from virnucpro_cli.store import disk

CONTIGS = Path(__file__).parent.parent / "examples" / "contigs.fna"
OTHERS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE)
"""Errors that say that something is wrong, of whatever call."""


def failing(patch: pytest.MonkeyPatch, call: str, number: int) -> list[int]:
    """Have a call end with an error number, as often as it is made; how often that was."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(number)
        raise OSError(number, os.strerror(number))

    real = os.fsync
    if call == "fsync of a folder":
        patch.setattr(os, "fsync", lambda fd: fail() if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd))
    elif call == "flock":
        patch.setattr("virnucpro_cli.store.disk.fcntl.flock", fail)
    elif call in ("link", "placeholder"):
        patch.setattr(
            disk, "rename_exclusive", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument"))
        )
        patch.setattr(os, "link", fail)
    else:
        ours = {"fallocate": "fallocate", "renameat2": "rename_exclusive"}
        patch.setattr(disk if call in ours else os, ours.get(call, call), fail)
    return calls


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), min_size=1, max_size=40), st.booleans())
def test_digests_that_are_taken_as_bytes_pass_are_those_of_the_file(
    writes: list[tuple[int, int]], in_order: bool
) -> None:
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "CHECKSUM_BLOCK", 64)
        passing, upto = disk.PassingDigests(), 0
        for number, (offset, size) in enumerate(writes):
            at = upto if in_order and number % 7 else offset
            data = memoryview(bytes([number + 1]) * size)
            with passing.taken(data, at):
                disk.pwrite_all(file.fileno(), data, at)
            upto = at + size
        passing.close()
        assert disk.checksum(file.fileno(), 1 << 20, 1 << 20, passing.whole) == disk.checksum(
            file.fileno(), 1 << 20, 1 << 20
        )
        assert not in_order or len(writes) < 3 or passing.whole or sum(size for _, size in writes) < 256


@pytest.fixture
def embed(make_fasta: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Callable[..., RunReport]:
    fasta = make_fasta([30, 90, 0, 150])

    def run(name: str = "out.h5", **more: Any) -> RunReport:
        options: dict[str, Any] = {
            "inputs": str(fasta),
            "model": str(tiny_model),
            "device": "cpu",
            "pool": ("mean", "residue"),
        }
        return embed_fasta(output=str(tmp_path / name), **options | more)

    return run


@pytest.mark.parametrize(
    ("call", "number"), [(call, number) for call, (numbers, _) in disk.REFUSALS.items() for number in numbers]
)
def test_a_file_system_without_a_call_is_done_without(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    embed("whole.h5")
    with monkeypatch.context() as patch:
        calls = failing(patch, call, number)
        report = embed()
    assert calls, "the call was never made"
    whole, found = datasets(tmp_path / "whole.h5"), datasets(tmp_path / "out.h5")
    assert all(found[name].tobytes() == values.tobytes() for name, values in whole.items())
    assert sorted(path.name for path in tmp_path.glob("out.h5*")) == ["out.h5"]
    assert any("without locks" in note for note in report.notes) == (call == "flock")


@pytest.mark.parametrize("number", OTHERS)
@pytest.mark.parametrize("call", disk.REFUSALS)
def test_a_call_that_fails_is_one_message_and_leaves_nothing_unfinished(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with monkeypatch.context() as patch:
        calls = failing(patch, call, number)
        with pytest.raises(UserError) as refused:
            embed()
    assert calls and str(tmp_path) in refused.value.what and refused.value.remedy
    assert not list(tmp_path.glob("*new"))
    embed()
    assert sorted(path.name for path in tmp_path.glob("out.h5*")) == ["out.h5"]


@pytest.mark.parametrize("number", [*disk.REFUSALS["flock"][0], errno.EACCES, errno.ENOSPC])
def test_the_lock_of_the_genes_is_named_where_there_are_none(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int,
) -> None:  # fmt: skip
    failing(monkeypatch, "flock", number)
    options = {"inputs": str(CONTIGS), "from_": "contigs", "genes": "six-frame", "quiet": False}
    if number in disk.REFUSALS["flock"][0]:
        embed(**options)
        assert "without locks" in "".join(capsys.readouterr())
    else:
        with pytest.raises(UserError, match=r"The lock of .*out\.proteins\.faa\.lock cannot be taken"):
            embed(**options)
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*new"))


def test_the_lock_of_a_killed_run_is_waited_for_while_its_workers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5.partial"
    worker, fd = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    disk.lock(worker, path)
    monkeypatch.setattr(disk, "LINGER", 0.0)
    with pytest.raises(UserError, match="Another run is writing"):
        disk.lock(fd, path)
    monkeypatch.undo()
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: os.close(worker))
    assert disk.lock(fd, path)
    os.close(fd)


def test_a_lock_that_has_no_room_is_named(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def full(path: Any, *how: Any, **more: Any) -> int:
        if str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *how, **more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(UserError, match=r"The lock .*\.lock cannot be made: No space"):
        embed(inputs=str(CONTIGS), from_="contigs", genes="six-frame")


@pytest.mark.parametrize("without", [(), ("renameat2",), ("renameat2", "link")])
def test_a_file_that_appeared_meanwhile_is_never_replaced(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    output, finish = tmp_path / "out.h5", store.Store.finish

    def appeared(file: store.Store, *arguments: Any) -> str:
        output.write_text("of somebody else")
        return finish(file, *arguments)

    monkeypatch.setattr(store.Store, "finish", appeared)
    for call in without:
        failing(monkeypatch, call, errno.EPERM)
    with pytest.raises(UserError, match="appeared while this run was working"):
        embed()
    assert output.read_text() == "of somebody else" and store.partial_path(output).exists()


def test_a_system_without_fdatasync_and_fallocate_is_done_without(
    embed: Callable[..., RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's."""
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: object())
    embed()
    with store.read_embeddings(tmp_path / "out.h5") as file:
        assert file.complete and file.unaltered


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this machine has no /proc")
def test_a_file_system_that_does_not_count_what_is_free_is_not_full() -> None:
    output = Path("/proc/out.h5")
    assert disk.free_space(output) is None and disk.has_room(output, 1 << 60)
    disk.check_free_space(output, 1 << 60)


def test_room_that_nobody_knows_of_is_told_as_such(
    embed: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "free_space", lambda output: None)
    monkeypatch.setattr(store, "free_space", lambda output: None)
    embed(dry_run=True, quiet=False)
    assert "its file system does not say how much is free\n" in capsys.readouterr().err
    assert "which does not say how much is free" in doctor._room("this folder", Path(), "", "").found


def test_a_disk_that_cannot_be_asked_to_begin_is_done_without(tmp_path: Path) -> None:
    """As a pipe, and a descriptor that is closed; a file has the same bytes after it."""
    path = tmp_path / "file"
    path.write_bytes(b"ACDE" * 5000)
    with open(path, "r+b", buffering=0) as file:
        disk.begin_to_write(file.fileno(), 4096, 1 << 40)
    disk.begin_to_write(file_number := os.dup(0), 0, 4096)
    os.close(file_number)
    disk.begin_to_write(file_number, 0, 4096)
    assert path.read_bytes() == b"ACDE" * 5000


def test_without_a_home_a_model_by_its_path_runs_and_a_named_one_says_what_to_set(
    embed: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    embed()
    for name in ("demo", "8M"):
        with pytest.raises(UserError, match="no home directory") as told:
            locate.fetch(name, print)
        assert "XDG_CACHE_HOME" in told.value.remedy
    findings = {finding.what: finding for finding in doctor.look()}
    assert "XDG_CACHE_HOME" in findings["cache"].remedy


def test_a_cache_folder_of_somebody_else_is_named_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(locate, "locate", lambda model: None)
    real = os.open

    def denied(path: Any, *how: Any, **more: Any) -> int:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *how, **more)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError, match=r"8M_UR50D\.lock cannot be made: Permission denied") as told:
        locate.fetch("8M", print)
    assert "XDG_CACHE_HOME" in told.value.remedy


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EACCES])
def test_doctor_sees_a_folder_without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    here = next(finding for finding in doctor.look() if finding.what == "this folder")
    assert "locks" not in here.remedy
    failing(monkeypatch, "flock", number)
    here = next(finding for finding in doctor.look() if finding.what == "this folder")
    assert "no file locks" in here.remedy


@pytest.mark.parametrize("command", ["verify", "validate", "search", "bench"])
def test_without_a_temporary_folder_a_command_says_so_with_exit_2(
    embed: Callable[..., RunReport], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], command: str,
) -> None:  # fmt: skip
    embed()
    (fasta,) = tmp_path.glob("*.fasta")
    model = ["--model", str(tiny_model), "--device", "cpu"]
    lines = {
        "verify": ["verify", tmp_path / "out.h5", "--fasta", fasta],
        "validate": ["validate", "--fasta", fasta, *model],
        "search": ["search", tmp_path / "out.h5", "--query", fasta],
        "bench": ["bench", *model],
    }
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which are pytest's
    with pytest.raises(SystemExit) as ended:
        cli.main([str(part) for part in lines[command]])
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    assert "nowhere" in err and "TMPDIR" in err and "No temporary folder can be made" in err


def test_what_was_removed_is_not_called_safe() -> None:
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    told = disk.disk_error(error, Path("out.h5"), resumable=True)
    assert "is lost" not in told.what and "was removed meanwhile" in told.remedy


def test_a_lock_that_cannot_be_made_is_not_waited_for(tmp_path: Path) -> None:
    told = pytest.raises(UserError, match="cannot be made: No such file")
    with told as caught, disk.alone(tmp_path / "no" / "x.lock", lambda _: None, "busy", "Wait for it.", wait=False):
        pass
    assert "Wait" not in caught.value.remedy


def test_room_is_saved_in_the_words_of_each_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="may need") as imported:
        disk.check_free_space(tmp_path / "out.h5", 1 << 60)
    assert "--layers" not in imported.value.remedy
    assert extract._renamed(embed_workflow.LESS) == "or write less (fewer --repr_layers, no per_tok)"
