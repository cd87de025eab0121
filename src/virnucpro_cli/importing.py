"""The import workflow: embeddings in the layout of another tool into a file like embed's, in the order of a FASTA if one is given.

Two passes over the source: a look at what is in it, from which the file is laid out, and the rows, placed where they belong.
"""

import json
import re
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import fasta, layouts, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.layouts.layout import Entry, Keys, Layout, What, possible
from virnucpro_cli.policies import POLICIES, decide
from virnucpro_cli.store import UNKNOWN

Int64 = NDArray[np.int64]
LAST = -1
"""The layer, where nobody says which: taken to be the last one."""
BATCH, BATCH_BYTES = 4096, 1 << 26
NOWHERE, SEVERAL = -1, -2
UNSAID: dict[str, Any] = {"long": "full", "dedup": False}
"""Policies, where the source names none."""


def _accession(name: str) -> str:
    found = re.match(r"(?:sp|tr)\|([^|]+)\|", name)
    return found[1] if found else name


READINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("name", str),
    ("first word of the name", lambda name: "".join(name.split(None, 1)[:1])),
    ("name with _ for / and .", lambda name: re.sub(r"[/.]", "_", "".join(name.split(None, 1)[:1]))),  # ProtTrans
    ("UniProt accession", _accession),
)
"""How names of a file and of a FASTA are made comparable; the first that finds most is taken."""


@dataclass
class _Found:
    """What is in the source, M entries. take: (kind, layer or None) of the source -> kind and layer in the file.

    keys: int64 [M], hashes of what entries are known by if not by name; names: the same of each of READINGS; lengths: residues, -1
    where not said; sizes: rows of residues; reasons: uint8, why an entry has no embedding.
    """

    take: dict[tuple[str, int | None], What]
    hidden: int
    dtype: np.dtype[Any]
    keyed: bool
    keys: Int64
    names: list[Int64]
    lengths: Int64
    sizes: Int64
    reasons: NDArray[np.uint8]
    name_bytes: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for kind, _ in self.take.values()))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for _, layer in self.take.values()}))


@dataclass
class _Plan:
    """The file to make. entry_of: int64 [N], which entry's rows each record gets, or NOWHERE."""

    layout: store.Layout
    entry_of: Int64
    config: EmbedConfig


def run(
    source: str, output: str, name: str | None = None, inputs: tuple[str, ...] = (), model: str | None = None,
    layer: int | None = None, overwrite: bool = False, out: Console | None = None,
) -> report.RunReport:  # fmt: skip
    """Import `source`, of the layout `name` or of what it looks like. inputs: the FASTA that was embedded; model, layer: what made
    the rows, where the source does not say it (or which of its layers to take). Raises UserError for what cannot be.
    """
    out, clock, target = out or report.console(), report.Clock(), Path(output)
    summary = report.RunReport("import")
    layout = _layout_of(source, name)
    store.check_destination(target)
    report.check_places({"output": output}, [source, *inputs])
    _make_way(target, overwrite)
    with _reading(source, layout):
        said = layout.provenance(Path(source))
    with clock.stage("look"):
        found = _look(source, layout, said, layer)
    if said.get("store_dtype") == "fp16":  # in a layout of fp32: nothing is lost
        found.dtype = np.dtype(np.float16)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent) as spool:
        with clock.stage("read FASTA"):
            table = (
                fasta.index(fasta.open_sources(inputs, Path(spool)), dedup=said.get("dedup", False)) if inputs else None
            )
        plan = _plan(source, output, layout, found, said, table, model, summary.notes)
        store.check_free_space(target, plan.layout.file_bytes)
        with report.Tracker(out, len(found), "proteins") as tracker:
            file = _filled(target, plan, _batches(source, layout, found), tracker, clock)
        try:
            skipped = int((file.status == store.SKIPPED).sum())
            summary.counts = {"proteins": len(file.status), "imported": len(file.status) - skipped, "skipped": skipped}
            for code in np.unique(file.reason[file.status == store.SKIPPED]).tolist():
                summary.notes.append(
                    f"{int((file.reason == code).sum()):,} proteins are without an embedding: {store.REASONS[code]}"
                )
            summary.seconds = dict(clock.seconds)
            summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), overwrite)
        finally:
            file.close()
    what = ", ".join(f"{kind}/{number}" for kind, number in found.take.values())
    out.print(f"{target}: {what} of {summary.counts['imported']:,} proteins from {source}, {layout.what}")
    for note in summary.notes:
        out.print(note, style="yellow")
    return summary


def _layout_of(source: str, name: str | None) -> Layout:
    if not Path(source).exists():
        raise UserError(f"There is no {source}.", f"Paths are relative to {Path.cwd()}.")
    if name is not None:
        return layouts.named(name)
    if store.fingerprint_of(Path(source)) is not None:
        raise UserError(f"{source} is already a file of embed's.")
    layout = layouts.guessed(Path(source))
    if layout is None:
        raise UserError(
            f"{source} looks like none of the layouts, or is damaged.",
            f"Say which it is: --from {' | '.join(each.name for each in layouts.LAYOUTS)}",
        )
    return layout


def _make_way(target: Path, overwrite: bool) -> None:
    """Nothing that exists is lost but what --overwrite names, and what a killed import left."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists.", "Choose another output with -o, or --overwrite it.")
    begun = store.partial_path(target)
    if begun.exists():
        there = store.fingerprint_of(begun)
        if there is None or "imported" not in there[0]:
            raise UserError(
                f"{begun} is of a run of embed.", "Finish that run first, or choose another output with -o."
            )
        store.discard_partial(target)


@contextmanager
def _reading(source: str, layout: Layout) -> Iterator[None]:
    """What libraries say of files that are damaged, or of another layout."""
    try:
        yield
    except UserError:
        raise
    except store.DAMAGE as error:
        raise UserError(
            f"{source} cannot be read as {layout.name}: {in_a_line(error)}.",
            "Is it whole, and of that layout? Say of which one: --from LAYOUT",
        ) from None


# --- what is in the source -------------------------------------------------------------------------------------------


def _look(source: str, layout: Layout, said: dict[str, Any], layer: int | None) -> _Found:
    """The first pass: names, shapes and reasons; rows are read only where the layout cannot do without."""
    keys, lengths, sizes, reasons = array("q"), array("q"), array("q"), array("B")
    names = [array("q") for _ in READINGS]
    take: dict[tuple[str, int | None], What] = {}
    hidden = name_bytes = 0
    keyed = True
    dtype = np.dtype(np.float16)
    with _reading(source, layout):
        for entry in layout.read(Path(source)):
            if not take:
                take = _taken(source, entry, said.get("layer"), layer)
                hidden = entry.values[next(iter(take))].shape[-1]
            size = 0
            for what, (kind, _) in take.items():
                rows = entry.values.get(what)
                shape = None if rows is None else rows.shape
                size = shape[0] if shape and kind == "residue" else size
                if (
                    rows is None
                    or rows.dtype.kind != "f"
                    or shape != ((size, hidden) if kind == "residue" else (hidden,))
                ):
                    other = "nothing" if rows is None else f"{rows.dtype} of shape {shape}"
                    raise ValueError(f"{entry.name!r} has {other} for its {kind} of {hidden} numbers, as others have")
                dtype = np.result_type(dtype, rows.dtype)
            keyed &= bool(entry.key)
            keys.append(hash(entry.key))
            for known, (_, reading) in zip(names, READINGS, strict=True):
                known.append(hash(reading(entry.name)))
            lengths.append(-1 if entry.length is None else entry.length)
            sizes.append(size)
            known_reason = entry.skipped in store.REASONS
            reasons.append(store.REASONS.index(entry.skipped) if known_reason else store.NOT_FINITE)
            name_bytes += len(entry.name.encode())
    if not take:
        raise UserError(f"{source} holds no protein.", "Is it the file that is meant?")
    return _Found(
        take, hidden, np.dtype(np.float16 if dtype == np.float16 else np.float32), keyed,
        np.frombuffer(keys, np.int64), [np.frombuffer(known, np.int64) for known in names],
        np.frombuffer(lengths, np.int64), np.frombuffer(sizes, np.int64), np.frombuffer(reasons, np.uint8), name_bytes,
    )  # fmt: skip


def _taken(source: str, entry: Entry, said: int | None, asked: int | None) -> dict[tuple[str, int | None], What]:
    if asked is not None and said is not None and asked != said:
        raise UserError(f"{source} says that it is of layer {said}.", f"Leave --layer {asked} out.")
    unsaid = next(layer for layer in (said, asked, LAST) if layer is not None)
    take = {(kind, layer): (kind, unsaid if layer is None else layer) for kind, layer in entry.values}
    chosen = {what: to for what, to in take.items() if asked is None or to[1] == asked}
    if not chosen:
        there = ", ".join(str(layer) for _, layer in take.values())
        raise UserError(f"{source} has no layer {asked}.", f"It has {there}: --layer {next(iter(take.values()))[1]}")
    return chosen


def _batches(source: str, layout: Layout, found: _Found) -> Iterator[list[dict[What, NDArray[Any]]]]:
    """The second pass: the rows of all entries in order, in the dtype of the file."""
    batch: list[dict[What, NDArray[Any]]] = []
    size = 0
    with _reading(source, layout), np.errstate(over="ignore"):
        for entry in layout.read(Path(source)):
            rows = {to: np.asarray(entry.values[what]).astype(found.dtype) for what, to in found.take.items()}
            batch.append(rows)
            size += sum(each.nbytes for each in rows.values())
            if len(batch) == BATCH or size > BATCH_BYTES:
                yield batch
                batch, size = [], 0
    yield batch


# --- which rows are whose --------------------------------------------------------------------------------------------


def _plan(
    source: str, output: str, layout: Layout, found: _Found, said: dict[str, Any], table: fasta.RecordTable | None,
    model: str | None, notes: list[str],
) -> _Plan:  # fmt: skip
    policies: dict[str, Any] = {name: said[name] for name in POLICIES if name in said}
    dtype = "fp16" if found.dtype == np.float16 else "fp32"
    full = policies.get("id") == "full"
    if table is None:
        entry_of = np.arange(len(found))
        entry_of[found.reasons > 0] = NOWHERE
        sizes = found.sizes
    else:
        entry_of = _joined(source, layout, found, table, full, notes)
        sizes = np.where(entry_of >= 0, found.sizes[entry_of], 0)
    config = EmbedConfig(
        tuple(entry.path for entry in table.sources) if table else (), output, layers=found.layers, pool=found.kinds,
        store_dtype=dtype, model=model or str(said.get("model", UNKNOWN)).split(" (")[0], **(UNSAID | policies),
    )  # fmt: skip
    n = len(entry_of)
    if table is None:
        lengths = np.where(found.lengths >= 0, found.lengths, sizes).astype(np.int32)
        replaced, flags, reason = np.zeros(n, np.int32), np.zeros(n, np.uint16), found.reasons.copy()
        reading = (entry.name for entry in layout.read(Path(source)))
        names, name_bytes = partial(_next_names, reading), found.name_bytes  # asked for once, in order
        if not lengths.any():
            notes.append("lengths are not known, and stand as 0: --fasta FILE tells them")
    else:
        work = decide(table, config)
        lengths, replaced, flags, reason = table.length, table.replaced, work.flags, work.reason
        kept = reason == 0
        reason[kept & (entry_of == NOWHERE)] = store.ABSENT
        reason[kept & (entry_of == SEVERAL)] = store.AMBIGUOUS
        there = kept & (entry_of >= 0)
        reason[there] = found.reasons[entry_of[there]]
        entry_of[reason > 0] = NOWHERE
        names, name_bytes = partial(table.names, full=full), table.text_bytes - table.residues
        expected = table.length
        if "residue" in found.kinds:
            flags[(entry_of >= 0) & (sizes < lengths)] |= store.TRUNCATED
            expected, told = work.embedded, sizes
        else:
            told = found.lengths[entry_of]
        if wrong := int(((entry_of >= 0) & (told >= 0) & (told != expected)).sum()):
            notes.append(
                f"{wrong:,} proteins have another length than in the FASTA: were they cut, or is it another FASTA?"
            )
        if said.get("input_sha256") and said["input_sha256"].split(",") != table.sha256:
            notes.append("the FASTA is not the one that was embedded: its content differs")
    sizes = np.where(entry_of >= 0, sizes, 0)
    made = store.Layout(
        found.hidden, found.layers, found.kinds, found.dtype, lengths, replaced, flags,
        np.where(reason > 0, store.SKIPPED, store.PENDING).astype(np.uint8), reason,
        np.append(0, np.cumsum(sizes)) if "residue" in found.kinds else None, names, name_bytes,
    )  # fmt: skip
    made.attributes.update(_attributes(source, layout, found, said, table, config))
    return _Plan(made, entry_of, config)


def _next_names(names: Iterator[str], start: int, stop: int) -> list[str]:
    return list(islice(names, stop - start))


def _joined(
    source: str, layout: Layout, found: _Found, table: fasta.RecordTable, full: bool, notes: list[str]
) -> Int64:  # fmt: skip
    """For each record of the FASTA the entry that is its, NOWHERE, or SEVERAL where a name does not tell."""

    def hashes(read: Callable[[int, int], Iterable[str]]) -> Int64:
        every = store.blocks(len(table))
        return np.concatenate([np.fromiter(map(hash, read(each.start, each.stop)), np.int64) for each in every])

    names = partial(table.names, full=full)
    if layout.key_of is not None and found.keyed:
        key_of = layout.key_of
        theirs, ours, how = found.keys, hashes(lambda a, b: map(key_of, table.sequences(a, b))), "sequence"
        best = _match(theirs, ours, by_content=True)
    else:
        ways = []
        if layout.longest and found.keyed:
            ours = hashes(Keys(names, len(table), layout.longest))
            alike = hashes(lambda a, b: (possible(name, layout.longest) for name in names(a, b)))
            ways.append((_all_of_a_key(_match(found.keys, ours), alike), found.keys, ours, "key"))
        for theirs, (how, reading) in zip(found.names, READINGS, strict=True):
            ours = hashes(lambda a, b, reading=reading: map(reading, names(a, b)))  # type: ignore[misc]
            ways.append((_match(theirs, ours), theirs, ours, how))
        best, theirs, ours, how = max(ways, key=lambda way: int((way[0] >= 0).sum()))
    if not (best >= 0).any():
        raise UserError(
            f"None of the {len(found):,} proteins of {source} is in the FASTA, by {how}.",
            "Is it the FASTA that was embedded, and is --from right?",
        )
    if left_out := int((~np.isin(theirs, ours)).sum()):
        notes.append(
            f"{left_out:,} of {len(found):,} proteins of {source} are not in the FASTA (by {how}) and are left out"
        )
    return best


def _match(theirs: Int64, ours: Int64, by_content: bool = False) -> Int64:
    """For each of ours the number of the one of theirs that is equal. Equal contents have equal rows; equal names need not."""
    if not by_content and np.array_equal(theirs, ours):
        return np.arange(len(ours))
    known, first, count = np.unique(theirs, return_index=True, return_counts=True)
    at = np.minimum(np.searchsorted(known, ours), len(known) - 1)
    there = known[at] == ours
    entry = np.where(there, first[at], NOWHERE)
    if not by_content:
        _, back, mine = np.unique(ours, return_inverse=True, return_counts=True)
        entry[there & ((count[at] > 1) | (mine[back] > 1))] = SEVERAL
    return entry


def _all_of_a_key(entry: Int64, keys: Int64) -> Int64:
    """The same, but where the names of several records come to one key, and not all of them are in the file, nobody knows whose those are."""
    _, back, count = np.unique(keys, return_inverse=True, return_counts=True)
    there = np.bincount(back, entry >= 0, len(count))
    return np.where(((there > 0) & (there < count))[back], SEVERAL, entry)


# --- the file ----------------------------------------------------------------------------------------------------------


def _attributes(
    source: str, layout: Layout, found: _Found, said: dict[str, Any], table: fasta.RecordTable | None,
    config: EmbedConfig,
) -> dict[str, Any]:  # fmt: skip
    fingerprint = {
        "imported": layout.name,
        "input_sha256": table.sha256 if table else [],
        "weights_sha256": said.get("weights_sha256", UNKNOWN),
        "layers": list(found.layers),
        "pool": list(found.kinds),
        "dtype": said.get("dtype", UNKNOWN),
        "store_dtype": config.store_dtype,
        **{name: getattr(config, name) for name in POLICIES},
        "attention": UNKNOWN,
        "device": UNKNOWN,
        "unknown": [name for name in ("long",) if name not in said],
    }
    inputs = [] if table is None else [
        {"path": each.path, "bytes": each.size, "sha256": sha} for each, sha in zip(table.sources, table.sha256, strict=True)
    ]  # fmt: skip
    return {
        "tool": "virnucpro",
        "tool_version": virnucpro_cli.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": json.dumps(sys.argv),
        "imported_from": f"{source} ({layout.name}{', of ' + said['tool'] if 'tool' in said else ''})",
        "config": json.dumps(asdict(config)),
        "environment": "{}",
        "model": config.model,
        "weights": UNKNOWN,
        "weights_origin": UNKNOWN,
        "approximate": False,
        **{name: fingerprint[name] for name in ("weights_sha256", "dtype", "store_dtype", "attention", "device")},
        **{name: json.dumps(fingerprint[name]) for name in ("layers", "pool")},
        "inputs": json.dumps(inputs),
        "fingerprint": json.dumps(fingerprint),
    }


def _filled(
    target: Path, plan: _Plan, batches: Iterator[list[dict[What, NDArray[Any]]]], tracker: report.Tracker, clock: report.Clock
) -> store.Store:  # fmt: skip
    """The file with all rows in it; nothing of it is left if that fails."""
    file = store.Store.create(target, plan.layout)
    try:
        with clock.stage("write"):
            records = np.argsort(plan.entry_of, kind="stable")
            entries = plan.entry_of[records]
            first = 0
            for batch in batches:
                a, b = np.searchsorted(entries, (first, first + len(batch))).tolist()
                _place(file, plan.layout, batch, records[a:b], entries[a:b] - first)
                file.commit()
                tracker.advance(len(batch))
                first += len(batch)
        return file
    except BaseException:
        with suppress(OSError):
            file.path.unlink()
        file.close()
        raise


def _place(
    file: store.Store, layout: store.Layout, batch: list[dict[What, NDArray[Any]]], records: Int64, which: Int64
) -> None:  # fmt: skip
    """The rows of batch[which] into the records'. What is not finite is no embedding: NaN, and skipped."""
    finite = np.array([all(np.isfinite(rows).all() for rows in each.values()) for each in batch], np.bool_)
    for i in np.flatnonzero(~finite).tolist():
        batch[i] = {what: np.full_like(rows, np.nan) for what, rows in batch[i].items()}
    if not len(records):
        return
    for kind, layer in batch[0]:
        rows = [batch[i][kind, layer] for i in which.tolist()]
        if kind == "residue":
            assert layout.residue_offsets is not None
            at = layout.residue_offsets[records]
            places = [np.arange(start, start + len(each)) for start, each in zip(at.tolist(), rows, strict=True)]
            file.place(kind, layer, np.concatenate(places), np.concatenate(rows))
        else:
            file.place(kind, layer, records, np.stack(rows))
    file.mark(records[finite[which]])
    file.mark(records[~finite[which]], store.SKIPPED, reason=store.NOT_FINITE)
