"""The output file: laid out whole, filled by `pwrite`, published only when complete, and read back."""

import fcntl
import json
import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from conftest import no_more_files
from virnucpro_cli import store
from virnucpro_cli.errors import UserError, damage_named
from virnucpro_cli.store import (
    DONE,
    EMPTY,
    PENDING,
    RECOMPUTED,
    SKIPPED,
    EmbeddingFile,
    Layout,
    Store,
    disk,
    read_embeddings,
    sums,
)
from virnucpro_cli.store.writer import DAMAGED

NAMES = ["alpha", "β-lactamase", "alpha", "delta", "epsilon", "zeta"]
LENGTHS = np.array([3, 2, 4, 0, 1, 5], np.int32)
OFFSETS = np.append(0, np.cumsum(LENGTHS, dtype=np.int64))
HIDDEN = 4
EMBEDDED = np.array([0, 1, 2, 4, 5])


def layout(
    kinds: tuple[str, ...] = ("mean", "bos", "residue"), layers: tuple[int, ...] = (0, 2), **changes: Any
) -> Layout:
    """Six records, the fourth skipped because it is empty."""
    n = len(LENGTHS)
    fields: dict[str, Any] = {
        "hidden": HIDDEN,
        "layers": layers,
        "kinds": kinds,
        "store_dtype": np.dtype(np.float32),
        "lengths": LENGTHS,
        "replaced": np.arange(n, dtype=np.int32),
        "flags": np.zeros(n, np.uint16),
        "status": np.where(LENGTHS == 0, SKIPPED, PENDING).astype(np.uint8),
        "reason": np.where(LENGTHS == 0, EMPTY, 0).astype(np.uint8),
        "residue_offsets": OFFSETS if "residue" in kinds else None,
        "names": lambda start, stop: NAMES[start:stop],
        "name_bytes": sum(len(name.encode()) for name in NAMES),
        "attributes": {"layers": json.dumps(layers), "fingerprint": json.dumps({"layers": layers})},
    }
    return Layout(**(fields | changes))


def values(rows: list[int], kind: str = "mean", layer: int = 2) -> np.ndarray:
    """Values that tell from which row, kind and layer they are."""
    base = {"mean": 1000, "bos": 2000, "residue": 3000}[kind] + 100 * layer
    return (base + np.asarray(rows)[:, None] * 10 + np.arange(HIDDEN)).astype(np.float32)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A complete file, every row placed."""
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    rows = np.array([0, 1, 2, 4, 5])
    for layer in (0, 2):
        for kind in ("mean", "bos"):
            file.place(kind, layer, rows, values(rows.tolist(), kind, layer))
        every = np.arange(OFFSETS[-1])
        file.place("residue", layer, every, values(every.tolist(), "residue", layer))
    file.mark(rows)
    file.finish('{"command": "embed"}', overwrite=False)
    file.close()
    return output


def test_the_file_has_the_datasets_of_schema_1(finished: Path) -> None:
    with h5py.File(finished) as file:
        found = {}
        file.visit(lambda name: found.update({name: file[name]}))
        shapes = {name: (item.shape, item.dtype.str) for name, item in found.items() if isinstance(item, h5py.Dataset)}
        shapes.pop("embeddings", None)
        shapes.pop("sequence_ids")
        pooled = {f"{kind}/{layer}": ((6, HIDDEN), "<f4") for kind in ("mean", "bos") for layer in (0, 2)}
        if "mean/2" not in shapes:  # h5py visits a dataset with two names once
            shapes["mean/2"] = (file["mean/2"].shape, file["mean/2"].dtype.str)
        assert shapes == pooled | {
            "residue/0": ((15, HIDDEN), "<f4"), "residue/2": ((15, HIDDEN), "<f4"), "residue/offsets": ((7,), "<i8"),
            "lengths": ((6,), "<i4"), "replaced": ((6,), "<i4"), "flags": ((6,), "<u2"), "status": ((6,), "|u1"),
            "reason": ((6,), "|u1"), "computed_by": ((6,), "|u1"), "run/environments": ((), f"|S{store.ENVIRONMENT_BYTES}"),
                "run/report": ((), f"|S{store.REPORT_BYTES}"), "run/checksum": ((), "|S64"), "run/complete": ((), "|u1"),
            "run/layout": ((), "|S32"), "run/sums": ((6,), "<u8"),
        }  # fmt: skip
        assert file.attrs["schema"] == 1
        assert file["sequence_ids"].asstr()[:].tolist() == NAMES
        assert json.loads(file.attrs["reason_names"])["4"] == "not finite"
        assert json.loads(file.attrs["status_names"]) == {"0": "pending", "1": "done", "2": "skipped"}


def test_everything_is_in_place_before_the_first_row(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    Store.create(output, layout()).close()
    partial = store.partial_path(output)
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    assert partial.stat().st_blocks * 512 >= partial.stat().st_size, "a full disk must show now, not later"
    with h5py.File(partial) as file:
        assert file["run/complete"][()] == 0
        assert file["status"][:].tolist() == [PENDING] * 3 + [SKIPPED] + [PENDING] * 2
        assert np.isnan(file["mean/2"][3]).all() and np.isnan(file["bos/0"][3]).all()


@pytest.mark.parametrize(
    "rows", [[4], [0, 1, 2], [5, 0, 2], [2, 1, 0, 5, 4], [0, 2, 4], []], ids=lambda rows: "-".join(map(str, rows))
)
def test_rows_land_where_they_belong_and_nowhere_else(tmp_path: Path, rows: list[int]) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    file.place("mean", 0, np.arange(6), np.full((6, HIDDEN), -1, np.float32))
    file.place("mean", 0, np.asarray(rows, np.int64), values(rows) if rows else np.empty((0, HIDDEN), np.float32))
    file.commit()
    file.close()
    expected = np.full((6, HIDDEN), -1, np.float32)
    for row in rows:
        expected[row] = values([row])[0]
    with h5py.File(store.partial_path(output)) as read:
        np.testing.assert_array_equal(read["mean/0"][:], expected)


@pytest.mark.parametrize(
    ("large", "most", "run"),
    [(1 << 15, 1 << 26, 16), (1, 1 << 26, 16), (1 << 15, 1, 16), (64, 200, 16), (1 << 15, 400, 2), (1 << 15, 600, 3)],
)
def test_gathered_rows_are_written_in_the_order_in_which_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, most: int, run: int
) -> None:
    """Whatever is written at once, gathered, or gathered in several rounds."""
    monkeypatch.setattr(store.writer, "LARGE_WRITE", large)
    monkeypatch.setattr(store.writer, "MOST_STAGED", most)
    monkeypatch.setattr(store.writer, "LONG_RUN", run)
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    expected = {kind: np.zeros((6, HIDDEN), np.float32) for kind in ("mean", "bos")}
    dice = np.random.default_rng(0)
    for _ in range(20):
        rows = dice.permutation(6)[: dice.integers(1, 6)]
        for kind in expected:
            new = dice.normal(size=(len(rows), HIDDEN)).astype(np.float32)
            scratch = new[:]  # a view, of memory that is used again
            file.place(kind, 0, rows, scratch)
            expected[kind][rows] = new
            new[:] = np.nan
        file.commit()
    file.close()
    with h5py.File(store.partial_path(output)) as read:
        for kind, wanted in expected.items():
            np.testing.assert_array_equal(read[f"{kind}/0"][:], wanted)


def test_rows_wait_for_their_neighbours_and_a_failed_write_keeps_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = np.random.default_rng(0).normal(size=(6, HIDDEN)).astype(np.float32)
    monkeypatch.setattr(store.writer, "MOST_STAGED", 4 * new[0].nbytes)
    monkeypatch.setattr(store.writer, "LONG_RUN", 3)
    file, written = Store.create(tmp_path / "out.h5", layout()), list[tuple[int, int]]()
    write, first = file._write, file.places["mean/0"].offset

    def full(data: memoryview, offset: int) -> None:
        raise UserError("No space is left.")

    file.place("mean", 0, np.array([0, 3]), new[[0, 3]])
    file.place("mean", 0, np.array([5]), new[[5]])
    monkeypatch.setattr(file, "_write", full)
    with pytest.raises(UserError):
        file.place("mean", 0, np.array([1, 2]), new[[1, 2]])
    monkeypatch.setattr(
        file, "_write", lambda data, offset: written.append((offset - first, len(data))) or write(data, offset)
    )
    file.place("mean", 0, np.array([4]), new[[4]])
    file.commit()
    assert written[0] == (0, new.nbytes)
    file.close()
    with h5py.File(store.partial_path(tmp_path / "out.h5")) as read:
        np.testing.assert_array_equal(read["mean/0"][:], new)


def test_values_that_do_not_fit_their_rows_are_a_bug_and_touch_nothing(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    for rows, new in ((np.array([0]), values([0, 1])), (np.array([0]), values([0]).astype(np.float16))):
        with pytest.raises(RuntimeError, match="than their rows"):
            file.place("mean", 0, rows, new)
    file.commit()
    file.close()
    with h5py.File(store.partial_path(tmp_path / "out.h5")) as read:
        assert not read["mean/0"][:3].any()


def test_a_later_value_of_a_row_wins_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.writer, "LARGE_WRITE", 6 * HIDDEN * 4)
    file = Store.create(tmp_path / "out.h5", layout())
    file.place("mean", 0, np.array([0, 2]), values([4, 5]))
    file.place("mean", 0, np.arange(6), values(list(range(6))))
    file.commit()
    file.close()
    with h5py.File(store.partial_path(tmp_path / "out.h5")) as read:
        np.testing.assert_array_equal(read["mean/0"][:], values(list(range(6))))


def test_a_row_placed_while_another_thread_commits_is_not_vouched_for_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    file.place("mean", 0, np.array([0]), values([0]))
    file.mark(np.array([0]))
    begun, pwrite = threading.Event(), os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        begun.set()
        time.sleep(0.05)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    committing = threading.Thread(target=file.commit)
    committing.start()
    begun.wait()
    file.place("mean", 0, np.array([4]), values([4]))
    file.mark(np.array([4]))
    committing.join()
    file.commit()
    file.close()
    with h5py.File(store.partial_path(tmp_path / "out.h5")) as read:
        assert read["status"][:].tolist() == [DONE, PENDING, PENDING, SKIPPED, DONE, PENDING]
        np.testing.assert_array_equal(read["mean/0"][4], values([4])[0])


def test_neighbours_that_came_apart_go_out_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    for row in (5, 1, 0, 4, 2):
        file.place("mean", 0, np.array([row]), values([row]))
    sizes: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: sizes.append(len(data)) or pwrite(fd, data, offset))
    file.commit()
    file.close()
    assert sizes == [3 * HIDDEN * 4, 2 * HIDDEN * 4]


def test_a_row_is_done_only_after_a_commit(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"

    def on_disk(name: str) -> list[int]:
        with h5py.File(store.partial_path(output), locking=False) as read:
            return read[name][:].tolist()

    file = Store.create(output, layout())
    before = on_disk("status")
    file.place("mean", 2, np.array([0, 5]), values([0, 5]))
    file.mark(np.array([5, 0]), flag=RECOMPUTED)
    file.mark(np.array([1]), SKIPPED, reason=store.NOT_FINITE)
    assert on_disk("status") == before
    file.commit()
    assert on_disk("status") == [DONE, SKIPPED, PENDING, SKIPPED, PENDING, DONE]
    assert on_disk("flags") == [RECOMPUTED, 0, 0, 0, 0, RECOMPUTED]
    assert on_disk("reason") == [0, store.NOT_FINITE, 0, EMPTY, 0, 0]
    file.mark(np.array([2]))
    file.close()
    resumed = Store.resume(output)
    assert resumed.status.tolist() == [DONE, SKIPPED, PENDING, SKIPPED, PENDING, DONE]
    resumed.close()


def test_a_process_that_may_open_no_more_files_is_not_told_to_discard_a_partial_file(tmp_path: Path) -> None:
    Store.create(tmp_path / "out.h5", layout()).close()
    path = store.partial_path(tmp_path / "out.h5")
    with no_more_files(), pytest.raises(UserError) as told, damage_named(path, *DAMAGED):
        h5py.File(path, locking=False)
    assert str(told.value).startswith(f"{path} cannot be read: too many files are open.")
    assert "ulimit -n" in told.value.remedy and "restart" not in str(told.value)


def test_what_there_was_no_memory_for_is_pending_again_and_what_a_policy_skips_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    file.mark(np.array([0]), SKIPPED, reason=store.NO_MEMORY)
    file.mark(np.array([1]), SKIPPED, reason=store.NOT_FINITE)
    file.commit()
    file.close()
    resumed = Store.resume(output)
    assert resumed.status.tolist() == [PENDING, SKIPPED, PENDING, SKIPPED, PENDING, PENDING]
    resumed.place("mean", 2, np.array([0]), values([0]))
    resumed.mark(np.array([0]))
    resumed.commit()
    resumed.close()
    with h5py.File(store.partial_path(output)) as read:
        assert read["status"][:2].tolist() == [DONE, SKIPPED]
        assert read["reason"][:4].tolist() == [0, store.NOT_FINITE, 0, EMPTY]


def test_rows_remember_the_environment_that_computed_them(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    for rows, where in (([0], '{"device": "one"}'), ([1, 4], '{"device": "two"}'), ([2], '{"device": "one"}')):
        file.compute_in(where)
        file.place("mean", 2, np.array(rows), values(rows))
        file.mark(np.array(rows))
        file.commit()
        file.close()
        file = Store.resume(output)
    file.close()
    with h5py.File(store.partial_path(output)) as read:
        assert read["computed_by"][:].tolist() == [1, 2, 1, 0, 2, 0]
        lines = read["run/environments"][()].decode().splitlines()
    assert lines == ["{}", '{"device": "one"}', '{"device": "two"}']


def test_rows_are_placed_and_marked_while_a_commit_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, waiting, placed, real = tmp_path / "out.h5", threading.Event(), threading.Event(), os.fdatasync

    def slow(fd: int) -> None:
        waiting.set()
        assert placed.wait(60)
        real(fd)

    file = Store.create(output, layout())
    file.place("mean", 2, np.array([0]), values([0]))
    file.mark(np.array([0]))
    monkeypatch.setattr(os, "fdatasync", slow)
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(file.commit)
        assert waiting.wait(60)
        file.place("mean", 2, np.array([1]), values([1]))
        file.mark(np.array([1]))
        placed.set()
        commit.result()
    assert file.status.tolist() == [DONE, PENDING, PENDING, SKIPPED, PENDING, PENDING]
    file.commit()
    file.close()
    resumed = Store.resume(output)
    assert resumed.recheck(layout()) == 0
    assert resumed.status.tolist() == [DONE, DONE, PENDING, SKIPPED, PENDING, PENDING]


def test_a_commit_reads_no_row_whose_digests_come_with_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, of = Store.create(tmp_path / "out.h5", layout(("mean",), (2,))), values([0, 1, 2])
    file.place("mean", 2, np.arange(3), of)
    file.mark(np.arange(2), row_sums=sums.of_rows("mean/2", of[:2]))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", lambda *_: pytest.fail("it reads"))
        file.commit()
    file.mark(np.arange(2, 3))
    file.commit()
    assert file.recheck(layout(("mean",), (2,))) == 0


def test_runs_of_residues_are_written_from_where_they_lie(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    every = np.arange(OFFSETS[-1])
    scattered = np.full((40, HIDDEN), -1, np.float32)
    starts, records = np.array([30, 2, 12, 20]), np.array([5, 0, 2, 1])
    for start, record in zip(starts, records, strict=True):
        own = every[OFFSETS[record] : OFFSETS[record + 1]]
        scattered[start : start + len(own)] = values(own.tolist(), "residue", 2)
    file.place("residue", 2, every, np.zeros((len(every), HIDDEN), np.float32))  # older, and staged
    file.place_runs("residue/2", OFFSETS[records], scattered, starts, LENGTHS[records])
    file.commit()
    expected = values(every.tolist(), "residue", 2)
    expected[OFFSETS[4] : OFFSETS[5]] = 0
    assert np.array_equal(file.read("residue/2", every), expected)
    with pytest.raises(RuntimeError):
        file.place_runs("residue/2", OFFSETS[records], scattered[:, ::2], starts, LENGTHS[records])


def test_after_a_failed_sync_nothing_is_vouched_for_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost write once: a later sync that succeeds says nothing of what was written before."""
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    file.place("mean", 2, np.array([0]), values([0]))
    file.mark(np.array([0]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(UserError, match="Input/output"):
            file.commit()
    file.mark(np.array([1]))  # placed by another process before the sync that failed
    with pytest.raises(UserError, match="Input/output"):
        file.commit()
    file.close()
    assert Store.resume(output).status.tolist() == [PENDING, PENDING, PENDING, SKIPPED, PENDING, PENDING]


def test_a_commit_that_is_interrupted_writes_its_columns_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    file.compute_in('{"device": "two"}')
    file.mark(np.array([0, 2]), flag=RECOMPUTED)
    real, left = os.pwrite, [1]

    def interrupted(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    for calls in range(3):
        left[0] = calls
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                file.commit()
    file.commit()
    file.close()
    with h5py.File(store.partial_path(output)) as read:
        assert read["computed_by"][:3].tolist() == [1, 0, 1] and read["flags"][:3].tolist() == [
            RECOMPUTED,
            0,
            RECOMPUTED,
        ]


def test_a_row_computed_after_all_loses_the_mark_of_having_been_recomputed(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    file.mark(np.array([0, 1]), flag=RECOMPUTED)
    file.commit()
    file.mark(np.array([0]))
    file.commit()
    assert file.flags[:2].tolist() == [0, RECOMPUTED]
    file.close()


def test_a_torn_line_of_environments_is_none(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    offset = file.places["run/environments"].offset
    file.close()
    with open(store.partial_path(output), "r+b") as torn:
        torn.seek(offset)
        torn.write(b'{}\n{"device": "tw')
    file = Store.resume(output)
    assert file.environments == ["{}"]
    file.compute_in('{"device": "two"}')
    file.close()
    file = Store.resume(output)
    assert file.environments == ["{}", '{"device": "two"}']
    file.close()


def test_more_environments_than_there_is_room_for_are_no_obstacle(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    for i in range(store.ENVIRONMENT_BYTES // 100):
        file.compute_in(f'{{"device": "{i:0200d}"}}')
    file.mark(np.array([1]))
    file.commit()
    assert file.computed_by[1] == store.schema.MOST_ENVIRONMENTS and file.status[1] == DONE
    file.close()


def test_a_commit_of_no_rows_changes_nothing(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    before = store.partial_path(tmp_path / "out.h5").read_bytes()
    file.mark(np.empty(0, np.int64))
    file.commit()
    file.close()
    assert store.partial_path(tmp_path / "out.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("kinds", "same_as"), [(("bos", "mean"), "mean/2"), (("bos", "residue"), "bos/2"), (("residue",), None)]
)
def test_embeddings_is_the_last_layers_mean_else_bos_else_absent(
    tmp_path: Path, kinds: tuple[str, ...], same_as: str | None
) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout(kinds))
    file.mark(EMBEDDED)
    file.finish("{}", overwrite=False)
    file.close()
    with h5py.File(output) as read:
        if same_as is None:
            assert "embeddings" not in read
        else:
            assert read["embeddings"] == read[same_as]
    if same_as is None:
        with read_embeddings(output) as read, pytest.raises(KeyError, match="residues"):
            read[0]


def test_finish_gives_the_file_its_final_name(tmp_path: Path, finished: Path) -> None:
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5"]
    assert store.fingerprint_of(finished) == ({"layers": [0, 2]}, True)


def test_a_file_with_a_pending_record_is_never_called_complete(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    file.place("mean", 2, np.array([0, 1]), values([0, 1]))
    file.mark(np.array([0, 1]))
    with pytest.raises(UserError, match=r"3 records of .*partial were not computed"):
        file.finish("{}", overwrite=False)
    file.close()
    assert not (tmp_path / "out.h5").exists() and not read_embeddings(tmp_path / "out.h5.partial").complete


def test_finish_never_replaces_a_file_that_appeared_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    file = Store.create(output, layout())
    output.write_text("somebody's thesis")
    file.mark(EMBEDDED)
    with pytest.raises(UserError, match="appeared"):
        file.finish("{}", overwrite=False)
    file.close()
    assert output.read_text() == "somebody's thesis"
    assert store.fingerprint_of(store.partial_path(output)) == ({"layers": [0, 2]}, True)


def test_overwrite_replaces_a_finished_file_only_at_the_end(tmp_path: Path, finished: Path) -> None:
    old = finished.read_bytes()
    file = Store.create(finished, layout(("bos",)))
    assert finished.read_bytes() == old
    file.mark(EMBEDDED)
    file.finish("{}", overwrite=True)
    file.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5"]
    with h5py.File(finished) as read:
        assert "mean" not in read and "bos" in read


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LINGER", 0.0)
    output = tmp_path / "out.h5"
    first = Store.create(output, layout())
    with pytest.raises(UserError, match="Another run"):
        Store.resume(output)
    first.close()
    Store.resume(output).close()


def test_a_second_writer_leaves_the_first_ones_unfinished_layout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LINGER", 0.0)
    output = tmp_path / "out.h5"
    new = tmp_path / "out.h5.partial.virnucpro-new"
    with open(new, "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run"):
            Store.create(output, layout())
        assert new.exists()


def test_an_abandoned_layout_is_no_obstacle(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    (tmp_path / "out.h5.partial.virnucpro-new").write_bytes(b"\x89HDF half a layout" * 1000)
    Store.create(output, layout()).close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5.partial"]


def test_reading_by_number_slice_name_and_iteration(finished: Path) -> None:
    with read_embeddings(finished) as file:
        assert len(file) == 6 and file.complete and file.layers == [0, 2] and file.names == NAMES
        assert file.report == {"command": "embed"}
        assert file.attributes["schema"] == 1
        np.testing.assert_array_equal(file[1], values([1])[0])
        np.testing.assert_array_equal(file[-1], values([5])[0])
        np.testing.assert_array_equal(file[4:6], values([4, 5]))
        np.testing.assert_array_equal(file["β-lactamase"], values([1])[0])
        np.testing.assert_array_equal(file.dataset("bos", 0)[0], values([0], "bos", 0)[0])
        assert file.lengths.tolist() == LENGTHS.tolist()
        assert file.status.tolist() == [DONE] * 3 + [SKIPPED] + [DONE] * 2
        assert file.reason.tolist() == [0, 0, 0, EMPTY, 0, 0]
        pairs = list(file)
    assert [name for name, _ in pairs] == NAMES
    np.testing.assert_array_equal(pairs[2][1], values([2])[0])
    assert np.isnan(pairs[3][1]).all()


def test_a_name_that_occurs_twice_is_refused_where_a_single_row_is_asked_for(finished: Path) -> None:
    with read_embeddings(finished) as file:
        assert file.rows("alpha") == [0, 2]
        for ask in (file.__getitem__, file.residues):
            with pytest.raises(UserError, match=r"2 records .*'alpha': 0, 2.*\n.*rows\('alpha'\)"):
                ask("alpha")
        with pytest.raises(KeyError):
            file["no such protein"]


def test_residues_of_a_record_by_number_or_name(finished: Path) -> None:
    with read_embeddings(finished) as file:
        np.testing.assert_array_equal(file.residues(2), values([5, 6, 7, 8], "residue"))
        np.testing.assert_array_equal(file.residues("zeta", layer=0), values([10, 11, 12, 13, 14], "residue", 0))
        np.testing.assert_array_equal(file.residues(-1), file.residues(5))
        assert file.residues("delta").shape == (0, HIDDEN)


def test_a_foreign_hdf5_file_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    assert store.fingerprint_of(tmp_path / "other.h5") is None
    with pytest.raises(UserError, match="schema"):
        EmbeddingFile(tmp_path / "other.h5")


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (store.NAME_BLOCK + 1, None)])
def test_blocks_hold_everything_once_and_no_more_than_their_size(n: int, size: int | None) -> None:
    each = list(store.blocks(n) if size is None else store.blocks(n, size))
    assert [i for block in each for i in range(block.start, block.stop)] == list(range(n))
    assert all(0 < block.stop - block.start <= (size or store.NAME_BLOCK) for block in each)


def test_a_commit_takes_few_bytes_for_each_of_many_rows(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        of_all = {"lengths": np.ones(n, np.int32), "replaced": np.zeros(n, np.int32), "reason": np.zeros(n, np.uint8)}
        of_all |= {"flags": np.zeros(n, np.uint16), "status": np.full(n, PENDING, np.uint8)}
        names = lambda start, stop: [str(i) for i in range(start, stop)]  # noqa: E731
        file = Store.create(tmp_path / f"{n}.h5", layout(("mean",), names=names, name_bytes=7 * n, **of_all))
        for rows in np.split(np.random.default_rng(0).permutation(n), 64):
            file.mark(rows, row_sums=rows.astype(np.uint64))
        tracemalloc.start()
        try:
            file.commit()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            file.close()

    few, many = 1 << 18, 1 << 20
    assert (peak(many) - peak(few)) / (many - few) < 32
