"""The merge workflow: all shards of an output, checked against one another, into one file in the order of the FASTA.

Every byte of a shard is read once. Rows are compared with the checksums that their shard has of them as they pass, and
only then written. A killed merge goes on with the same command; it leaves an ordinary partial file.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import report, store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.fasta import index_of, kept
from virnucpro_cli.features import Shards, stored_in
from virnucpro_cli.kinds import any_by_residue, by_residue, unmasked
from virnucpro_cli.plan import shards
from virnucpro_cli.stopping import cores
from virnucpro_cli.store import sums
from virnucpro_cli.store.disk import alone
from virnucpro_cli.store.schema import HALVES, chunks
from virnucpro_cli.texts import Texts, ranges

if TYPE_CHECKING:
    from virnucpro_cli.store.parts import Half

BLOCK_BYTES = 1 << 26
AHEAD = 2
"""Chunks of the merged file that are read before they are written."""
MOST_READERS = 8
COPY_AGAIN = "Copy it again, or run its shard again with --overwrite."
FROM_THE_LAYOUT = ("schema", "status_names", "flag_names", "reason_names", "columns", "tables")


@dataclass(frozen=True)
class _Part:
    """A shard's file, open. rows: it, or its half, whose rows and states are read.

    records: int64 [M], rising; offsets: int64 [M + 1] with per-residue rows.

    sums: uint64 [M], digests of each record's rows, added up; None where the whole file was compared with its checksum.
    """

    path: Path
    file: store.EmbeddingFile
    rows: "store.EmbeddingFile | Half"
    settings: dict[str, Any]
    records: NDArray[np.int64]
    offsets: NDArray[np.int64] | None
    columns: dict[str, NDArray[Any]]
    sums: NDArray[np.uint64] | None


class _Damaged(UserError):
    """A shard's bytes are not those that embed wrote."""

    def __init__(self, path: Path):
        super().__init__(f"{path} is damaged: its bytes are not those that embed wrote.", COPY_AGAIN)


@dataclass
class _Chunk:
    """Records [start, stop) of the merged file while they are read. values: by dataset; sums: uint64 [stop - start]."""

    start: int
    stop: int
    values: dict[str, NDArray[Any]]
    sums: NDArray[np.uint64]
    reading: list[Future[None]] = field(default_factory=list)


def merge_shards(
    output: str,
    count: int | None = None,
    overwrite: bool = False,
    report_path: str | None = None,
) -> report.RunReport:
    """Merge the shards of `output`. count: the number of shards, if there are several sets.

    Raises UserError for a shard that is missing or differs.
    """
    target = store.behind(Path(output))
    store.check_destination(target)
    out, clock = report.console(), report.Clock()
    summary = report.RunReport("merge")
    with ExitStack() as opened:
        with clock.stage("check"):
            paths = _all_of(target, count)
            report.check_places({"report": report_path}, [target, store.partial_path(target), *paths], overwrite)
            parts = _opened(paths, opened)
            fingerprint = _checked(parts)
        summary.counts = {"shards": len(parts), "proteins": sum(len(part.records) for part in parts)}
        if target.exists() and not overwrite:
            there = store.fingerprint_tried(target)
            if there is None or not there[1] or store.differences(there[0], fingerprint):
                raise UserError(f"{target} exists and is not of these shards.", "Move it away, or --overwrite it.")
            out.print(f"{target} is already complete: same input, model and settings.")
            summary.already_complete = True
            return _saved(summary, report_path)
        lock, waiting = target.with_name(f"{target.name}.merging"), f"Another merge is writing {target} now."
        opened.enter_context(alone(lock, lambda _: None, waiting, "Wait for it to end.", wait=False))
        with clock.stage("lay out"):
            file = _store(target, parts, fingerprint)
        with file.filling():
            if not file.locked:
                out.print(store.without_lock(file.path), style="yellow")
            with (
                clock.stage("copy"), _gone_if_damaged(file),
                report.Tracker(out, max(1, len(file.status) * (1 + len(file.halves))), "proteins") as tracker,
            ):  # fmt: skip
                for rows in _all_copied(parts, file, fingerprint):
                    tracker.advance(rows)
            with clock.stage("features"):
                for feature in stored_in(parts[0].file):
                    feature.merge(file, _shards(parts))
            word, _ = parts[0].file.words
            summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
            summary.seconds = dict(clock.seconds)
            summary.tables["Computed by"] = report.where_computed(
                file.environments, file.computed_by, file.status == store.DONE
            )
            summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), overwrite)
    kept.forget(index_of(target))
    out.print(
        f"{target}: {counted(summary.counts['proteins'], word)} of {counted(len(parts), 'shard')}, "
        f"{report.size(target.stat().st_size)}"
    )
    return _saved(summary, report_path)


def _saved(summary: report.RunReport, path: str | None) -> report.RunReport:
    """The report, saved if there is a path."""
    if path:
        report.save(path, summary.to_json())
    return summary


# --- what is there -------------------------------------------------------------------------------------------------


def _all_of(output: Path, count: int | None) -> list[Path]:
    """The finished shards 1, 2, ... of the output."""
    sets = shards.files_of(output)
    if count is None:
        if len(sets) > 1:
            counts = " and ".join(map(str, sorted(sets)))
            raise UserError(f"There are shards of {output} of {counts}.", f"Say which: --of {max(sets)}.")
        count = next(iter(sets), 0)
    there = sets.get(count, {})
    if not there:
        raise UserError(
            f"There is no shard of {output}{f' of {count}' if count else ''}.", "virnucpro embed ... --shard 1/40"
        )
    lacking = [n for n in range(1, count + 1) if n not in there or there[n].suffix == ".partial"]
    if lacking:
        named = ", ".join(map(str, lacking[:10])) + (f" and {len(lacking) - 10} more" if len(lacking) > 10 else "")
        raise UserError(
            f"{len(lacking)} of {counted(count, 'shard')} of {output} missing or not finished: {named}.",
            "Run them again with their --shard; virnucpro status shows how far each is.",
        )
    return [there[n] for n in range(1, count + 1)]


def _opened(paths: list[Path], stack: ExitStack) -> list[_Part]:
    store.allow_open_files(len(paths))
    parts = []
    for path, file in zip(paths, store.opened_all(paths), strict=True):
        stack.enter_context(file)
        settings = file.settings
        if file.records is None or not file.complete:
            raise UserError(f"{path} is not a finished shard.", "Run its shard again.")
        vouched = file.is_as_laid_out
        if not vouched and not file.unaltered:
            raise _Damaged(path)
        offsets = file.residue_offsets if _by_residue(settings) else None
        row_sums = file.at("run/sums")[:] - file.state_sums if vouched else None
        parts.append(_Part(path, file, file, settings, file.records, offsets, file.columns, row_sums))
    return parts


@contextmanager
def _gone_if_damaged(file: store.Store) -> Iterator[None]:
    """Remove the partial file when a shard turns out to be damaged."""
    try:
        yield
    except _Damaged:
        file.path.unlink()
        raise


def _of_the_whole(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "shard"}


def _checked(parts: list[_Part]) -> dict[str, Any]:
    """The fingerprint of the whole, after a look at whether the parts are parts of one."""
    first = parts[0]
    for number, part in enumerate(parts, start=1):
        if part.settings.get("shard") != f"{number}/{len(parts)}":
            raise UserError(
                f"{part.path} holds shard {part.settings.get('shard')}, not what its name says.",
                "Give it its name back.",
            )
        if differing := store.differences(_of_the_whole(first.settings), _of_the_whole(part.settings)):
            raise UserError(
                f"{part.path} is not of the run of {first.path}: {'; '.join(differing)}.",
                "Run the shards that differ again, all with the same input and options.",
            )
    every = np.sort(np.concatenate([part.records for part in parts]))
    if not (every == np.arange(len(every))).all():
        raise UserError(
            "The shards do not hold every record once.", "Run all of them again with one version of virnucpro."
        )
    return _of_the_whole(first.settings)


# --- the one file ----------------------------------------------------------------------------------------------------


def _store(output: Path, parts: list[_Part], fingerprint: dict[str, Any]) -> store.Store:
    """The partial file of an earlier merge, or a new one: columns are final, rows still to be copied are pending."""
    begun, layout = store.partial_path(output), _layout(parts, fingerprint)
    if begun.exists():
        there = store.fingerprint_tried(begun, "Move it away.")
        if there is None or store.differences(there[0], fingerprint):
            raise UserError(f"{begun} is of something else.", "Move it away.")
        file = store.Store.resume(output)
        try:
            file.recheck(layout)
        except BaseException:
            file.close()
            raise
        return file
    store.check_free_space(output, layout.data_bytes)
    return store.Store.create(output, layout)


def _layout(parts: list[_Part], fingerprint: dict[str, Any]) -> store.Layout:
    """Layout of the merged file. Columns are copied from the shards; rows still to be copied are pending."""
    n = sum(len(part.records) for part in parts)

    def names(start: int, stop: int) -> Texts:
        spans = [(part, *np.searchsorted(part.records, (start, stop)).tolist()) for part in parts]
        texts = Texts.joined([part.file.name_texts(a, b) for part, a, b in spans if a < b])
        return texts.take(np.argsort(np.concatenate([part.records[a:b] for part, a, b in spans])))

    environments = list(dict.fromkeys(line for part in parts for line in _environments(part)))
    spec = parts[0].file.dataset(fingerprint["pool"][0], fingerprint["layers"][0])
    offsets = _offsets(parts, n) if _by_residue(fingerprint) else None
    scores = unmasked(fingerprint.get("emit", ()))
    columns = parts[0].file.dataset("unmasked", "logits").shape[1] if "logits" in scores else 0
    lengths, replaced = _column(parts, "lengths"), _column(parts, "replaced")
    extra, states = _extra(parts), _states(parts, n, environments)
    for name in (each for each in HALVES if each in fingerprint):
        halves, its = _of_half(parts, name), fingerprint[name]
        rows = halves[0].rows.at(f"{its['pool'][0]}/{its['layers'][0]}")
        extra |= store.Extra(halves={name: store.Layout(
            rows.shape[1], tuple(its["layers"]), tuple(its["pool"]), rows.dtype, lengths, replaced,
            residue_offsets=None, names=names, name_bytes=0, **_states(halves, n, environments),
            extra=store.Extra(rows=extra.rows),
        )})  # fmt: skip
    layout = store.Layout(
        spec.shape[1], tuple(fingerprint["layers"]), tuple(fingerprint["pool"]), spec.dtype, lengths, replaced,
        residue_offsets=offsets, names=names, name_bytes=0, environment="\n".join(environments), **states,
        unmasked=scores, attributes=_attributes(parts, fingerprint), extra=extra, vocabulary=columns,
    )  # fmt: skip
    layout.attributes["merged_from"] = json.dumps([part.path.name for part in parts])
    copied = sum(
        prod(shape) * of.itemsize for name, (shape, of) in layout.filled.items() if not name.startswith("groups/")
    )
    return replace(layout, name_bytes=max(0, sum(part.path.stat().st_size for part in parts) - copied))


def _of_half(parts: list[_Part], name: str) -> list[_Part]:
    """The parts as they hold the rows of another model."""
    halves = []
    for part in parts:
        half = part.file.half(name)
        row_sums = None if part.sums is None else half.at("run/sums")[:] - half.state_sums
        halves.append(replace(part, rows=half, offsets=None, sums=row_sums))
    return halves


def _column(parts: list[_Part], name: str) -> NDArray[Any]:
    return _gathered(parts, lambda part: getattr(part.rows, name))


def _environments(part: _Part) -> list[str]:
    return [json.dumps(each) for each in part.file.environments]


def _states(parts: list[_Part], n: int, environments: list[str]) -> dict[str, Any]:
    """Columns that say what became of n records, [n]: rows that are to be copied are pending."""
    status, computed_by = _column(parts, "status"), np.zeros(n, np.uint8)
    for part in parts:
        known = np.array([environments.index(line) for line in _environments(part)])
        computed_by[part.records] = known[np.minimum(part.rows.computed_by, len(known) - 1)]
    pending = np.where(status == store.DONE, store.PENDING, status).astype(np.uint8)
    flags, reason = _column(parts, "flags"), _column(parts, "reason")
    return {"status": pending, "flags": flags, "reason": reason, "computed_by": computed_by}


def _extra(parts: list[_Part]) -> store.Extra:
    """Columns gathered, tables as the first shard has them, and what features make of their parts."""

    def gathered(name: str) -> NDArray[Any]:
        return _gathered(parts, lambda part: part.columns[name][:])

    def table(name: str, data: Any) -> Any:
        if data.dtype != object:
            return data[:]
        counted_already = 0  # in the bytes of the shards
        return store.Names(len(data), partial(parts[0].file.texts, name), counted_already)

    tables = {name: table(name, data) for name, data in parts[0].file.tables.items()}
    features = stored_in(parts[0].file)
    remade = {name for feature in features for name in feature.remade}
    extra = store.Extra({name: gathered(name) for name in parts[0].columns if name not in remade}, tables)
    for feature in features:
        extra |= feature.of_merged(extra, _shards(parts))
    return extra


def _shards(parts: list[_Part]) -> Shards:
    return [(part.records, part.file) for part in parts]


def _attributes(parts: list[_Part], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the first shard, except for those of the whole."""
    first = {key: value for key, value in parts[0].file.attributes.items() if key not in FROM_THE_LAYOUT}
    devices = dict.fromkeys(str(part.file.attributes["device"]) for part in parts)
    return first | {
        **store.of_this_command(),
        "device": ", ".join(devices),
        "config": json.dumps(json.loads(first["config"]) | {"shard": None}),
        "fingerprint": json.dumps(fingerprint),
    }


def _all_copied(parts: list[_Part], file: store.Store, fingerprint: dict[str, Any]) -> Iterator[int]:
    """Copy the rows of the file, then those of its halves, and say how many records each chunk was."""
    file.hash_as_written()
    yield from _copied(parts, file, fingerprint)
    for name, half in file.halves.items():
        yield from _copied(_of_half(parts, name), half, fingerprint[name])


def _copied(parts: list[_Part], file: store.Store, fingerprint: dict[str, Any]) -> Iterator[int]:
    """Copy all rows that are not there, a chunk of the input after the other, and say how many records each was.

    Threads read the next chunks while one is written, and another thread waits for the disk.
    """
    n, offsets = len(file.status), _offsets(parts, len(file.status))
    names = [f"{kind}/{layer}" for kind in fingerprint["pool"] for layer in fingerprint["layers"]]
    names += [f"unmasked/{name}" for name in unmasked(fingerprint.get("emit", ()))]
    width = max(file.places[name].row_bytes for name in names)
    file.keep_environments()
    columns = _column(parts, "status"), _column(parts, "reason")
    ahead, synced = deque[_Chunk](), deque[Future[None]]()
    with ThreadPoolExecutor(min(cores() + 2, MOST_READERS)) as readers, ThreadPoolExecutor(1) as syncing:

        def written() -> int:
            chunk = ahead.popleft()
            for each in chunk.reading:
                each.result()
            _write(file, chunk, offsets, *columns)
            synced.append(syncing.submit(file.commit))
            if len(synced) > 1:
                synced.popleft().result()
            return chunk.stop - chunk.start

        try:
            for start, stop in chunks(offsets, n, max(1, BLOCK_BYTES // width)):
                if (file.status[start:stop] == store.DONE).all():
                    yield stop - start
                    continue
                ahead.append(_begun(parts, file, names, (start, stop), offsets, readers))
                if len(ahead) > AHEAD:
                    yield written()
            while ahead:
                yield written()
            for each in synced:
                each.result()
        finally:
            readers.shutdown(cancel_futures=True)


def _begun(
    parts: list[_Part], file: store.Store, names: list[str], records: tuple[int, int], offsets: NDArray[np.int64],
    readers: ThreadPoolExecutor,
) -> _Chunk:  # fmt: skip
    """A chunk whose rows `readers` fill in."""
    start, stop = records
    sizes = {True: int(offsets[stop] - offsets[start]), False: stop - start}
    values = {}
    for name in names:
        extent = file.places[name]
        shape = sizes[_has_residues(name)], extent.row_bytes // extent.dtype.itemsize
        values[name] = np.empty(shape, extent.dtype)
    chunk = _Chunk(start, stop, values, np.zeros(stop - start, np.uint64))
    for part in parts:
        first, last = np.searchsorted(part.records, records).tolist()
        if first < last:
            chunk.reading.append(readers.submit(_take, part, first, last, chunk, offsets))
    return chunk


def _take(part: _Part, first: int, last: int, chunk: _Chunk, offsets: NDArray[np.int64]) -> None:
    """Read a shard's records [first, last), put their rows into the chunk, and compare them with their checksums."""
    records = part.records[first:last]
    there = np.zeros(last - first, np.uint64)
    for name, into in chunk.values.items():
        if _has_residues(name):
            assert part.offsets is not None
            own, counts = np.arange(*part.offsets[[first, last]]), np.diff(part.offsets[first : last + 1])
            rows, begin = ranges(offsets[records], counts), offsets[chunk.start]
        else:
            own, counts, rows, begin = np.arange(first, last), None, records, chunk.start
        if not len(own):
            continue
        values = part.rows.rows_at(name, int(own[0]), len(own)).reshape(len(own), -1)
        into[rows - begin] = values
        digests = sums.of_rows(name, values)
        there += digests if counts is None else sums.of_records(own, digests, counts)
        chunk.sums[records - chunk.start] += digests if counts is None else sums.of_records(rows, digests, counts)
    if part.sums is not None and (there != part.sums[first:last]).any():
        raise _Damaged(part.path)


def _write(
    file: store.Store, chunk: _Chunk, offsets: NDArray[np.int64], statuses: NDArray[np.uint8],
    reasons: NDArray[np.uint8],
) -> None:  # fmt: skip
    """Place a chunk's rows, and mark what is pending as its shard has it: statuses and reasons of all records, [N]."""
    start, stop = chunk.start, chunk.stop
    rows = np.arange(start, stop)
    for name, values in chunk.values.items():
        kind, _, layer = name.partition("/")
        file.place(kind, layer, np.arange(offsets[start], offsets[stop]) if _has_residues(name) else rows, values)
    status, reason = statuses[start:stop], reasons[start:stop]
    pending, recomputed = file.status[rows] == store.PENDING, (file.flags[rows] & store.RECOMPUTED) > 0

    def mark(of: NDArray[np.bool_], status: int = store.DONE, flag: int = 0, reason: int = 0) -> None:
        file.mark(rows[of], status, flag, reason, chunk.sums[of])

    mark(pending & (status == store.DONE) & ~recomputed)
    mark(pending & (status == store.DONE) & recomputed, flag=store.RECOMPUTED)
    # Skipped for want of memory by its shard, and so pending in a merge that is resumed.
    for code in np.unique(reason[pending & (status == store.SKIPPED)]).tolist():
        mark(pending & (status == store.SKIPPED) & (reason == code), store.SKIPPED, reason=code)


def _gathered(parts: list[_Part], column: Callable[[_Part], NDArray[Any]]) -> NDArray[Any]:
    """A column of all records, [N, ...], from that of each part."""
    columns = [column(part) for part in parts]
    whole = np.empty((sum(map(len, columns)), *columns[0].shape[1:]), columns[0].dtype)
    for part, own in zip(parts, columns, strict=True):
        whole[part.records] = own
    return whole


def _by_residue(settings: dict[str, Any]) -> bool:
    return any_by_residue(settings["pool"], settings.get("emit", ()))


def _has_residues(name: str) -> bool:
    return by_residue(*name.partition("/")[::2])


def _offsets(parts: list[_Part], n: int) -> NDArray[np.int64]:
    """Where the residues of each record begin, int64 [n + 1]; all zero without per-residue rows."""
    sizes = np.zeros(n, np.int64)
    for part in parts:
        if part.offsets is not None:
            sizes[part.records] = np.diff(part.offsets)
    return np.append(0, np.cumsum(sizes))
