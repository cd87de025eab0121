"""From contigs to the FASTA of their proteins, which is then embedded as any other: OUT.proteins.faa beside OUT.h5.

OUT.proteins.npz beside it vouches for what it was made from, and holds where on the contigs the proteins lie.
"""

import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features.contigs import chunks, codons, pyrodigal_gv, six_frame
from virnucpro_cli.features.contigs.found import Genes
from virnucpro_cli.features.feature import Feature
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.store import disk

CALLERS: dict[str, Any] = {"pyrodigal-gv": pyrodigal_gv, "six-frame": six_frame, "virnucpro": chunks}
"""Each has `settings(config)`, what its results depend on, `GAPS`, which says what becomes of gaps, and a `Caller(config)`, which is
called with (name, sequence) of a contig, the sequence in upper case with T for U, and returns its proteins as `Found`. Threads share it."""

LEAST_NUCLEOTIDES = 0.5
NUCLEOTIDES = b"ACGTURYSWKMBDHVNX-."
AHEAD = 4
"""Contigs in work or waiting for an earlier one, for each thread."""


@dataclass(frozen=True)
class Paths:
    """The files beside an output."""

    proteins: Path
    table: Path


def paths_of(output: Path) -> Paths:
    """`out.h5` to `out.proteins.faa` and `out.proteins.npz`."""
    return Paths(*(output.with_name(f"{output.stem}.proteins.{ending}") for ending in ("faa", "npz")))


class Contigs(Feature):
    """The proteins of contigs, which are embedded instead of the input."""

    def writes(self, whole: Path) -> list[Path]:
        return check(self.config, whole)

    def sources(
        self, sources: list[fasta.Source], whole: Path, out: Console, clock: report.Clock
    ) -> tuple[list[fasta.Source], store.Extra]:
        return find(self.config, sources, whole, out, clock)

    def note(self, layout: store.Layout, spec: ModelSpec) -> str | None:
        return noted(self.config, layout.extra.counts)


def check(config: EmbedConfig, output: Path) -> list[Path]:
    """The files that will be written beside the output. Raises UserError if they cannot be, or the caller is not installed."""
    CALLERS[config.genes].settings(config)
    paths = paths_of(output)
    for path in (paths.proteins, paths.table):
        disk.check_destination(path)
        if any(path.exists() and Path(name).exists() and path.samefile(name) for name in config.inputs):
            raise UserError(f"{path} is an input, and would be written.", "Choose another -o.")
    return [paths.proteins, paths.table]


def find(
    config: EmbedConfig, sources: list[fasta.Source], output: Path, out: Console, clock: report.Clock
) -> tuple[list[fasta.Source], store.Extra]:
    """The FASTA texts of the contigs' proteins, and what the output holds of the contigs.

    The proteins are found now, unless an earlier run has left them. Raises UserError for what is no contig, and without any protein.
    """
    paths = paths_of(output)
    caller = {"name": config.genes, **CALLERS[config.genes].settings(config)}
    with clock.stage("genes"):
        contigs = fasta.index(sources, dedup=False)
        _check(contigs)
        made_of = {"contigs_sha256": contigs.sha256, "gene_caller": caller}
        with _alone(paths, out):
            columns = _made_before(paths, made_of)
            if columns is None:
                _check_free(paths, config)
                columns = _make(paths, contigs, config, made_of, out)
                out.print(
                    f"{paths.proteins}: {counted(len(columns['contig']), 'protein')} of {counted(len(contigs), 'contig')}"
                )
            else:
                out.print(f"{paths.proteins} is of the same contigs and settings, and is used")
    names = store.Names(len(contigs), contigs.names, contigs.text_bytes - contigs.residues)
    in_gaps = columns.pop("gaps")
    return fasta.open_sources([str(paths.proteins)], output.parent), store.Extra(
        columns={f"genes/{name}": values for name, values in columns.items()},
        tables={"contigs/ids": names, "contigs/lengths": contigs.length, "contigs/gaps": in_gaps},
        attributes={"contigs": json.dumps(contigs.inputs), "gene_caller": json.dumps(caller)},
        fingerprint=made_of,
        counts={
            "contigs": len(contigs),
            "contigs without proteins": len(contigs) - len(np.unique(columns["contig"])),
            "contigs with gaps": int((in_gaps > 0).sum()),
            "bases in gaps": int(in_gaps.sum()),
        },
    )


def noted(config: EmbedConfig, counts: dict[str, int]) -> str | None:
    """A sentence on the gaps of the contigs; None without any."""
    if not counts.get("bases in gaps"):
        return None
    return (
        f"{counts['contigs with gaps']:,} of {counted(counts['contigs'], 'contig')} with gaps ({codons.GAP} or more N in a row), "
        f"{counts['bases in gaps']:,} bases in all: {CALLERS[config.genes].GAPS}"
    )


@contextmanager
def _alone(paths: Paths, out: Console) -> Iterator[None]:
    """One run at a time: of shards that begin together, the first finds the proteins and the others wait for it."""
    lock, waiting = Path(f"{paths.proteins}.lock"), f"another run is making {paths.proteins}: waiting for it"
    with disk.alone(lock, lambda text: out.print(text, style="yellow"), waiting):
        yield


def _check(contigs: fasta.RecordTable) -> None:
    """Raise UserError for proteins, and for contigs that their names do not tell apart."""
    for source, share in zip(contigs.sources, contigs.nucleotide_share, strict=True):
        if share < LEAST_NUCLEOTIDES:
            raise UserError(
                f"{source.path} does not look like contigs: {share:.1%} of its letters are A, C, G, T, U or N.",
                "For proteins leave out --from contigs.",
            )
    hashes = np.empty(len(contigs), np.int64)
    for block in store.blocks(len(contigs)):
        names = contigs.names(block.start, block.stop)
        if "" in names:
            number = block.start + names.index("") + 1
            raise UserError(f"Contig {number:,} has no name.", "Give each its own after the >.")
        hashes[block] = [hash(name) for name in names]
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(np.diff(hashes[order]) == 0)
    for first, second in sorted(zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True)):
        name = contigs.names(first, first + 1)[0]
        if name == contigs.names(second, second + 1)[0]:
            raise UserError(
                f"Contigs {first + 1:,} and {second + 1:,} are both named {name!r}, and so would be their proteins.",
                "Give each a name of its own, for example with its sample's in front, or embed each file by itself.",
            )


def _made_before(paths: Paths, made_of: dict[str, Any]) -> dict[str, NDArray[Any]] | None:
    """Columns of the proteins that are there (see `_make`), if they are of these contigs and settings, and whole."""
    try:
        with np.load(paths.table, allow_pickle=False) as table, open(paths.proteins, "rb") as proteins:
            there = json.loads(str(table["made_of"]))
            if there != made_of | {"proteins_sha256": hashlib.file_digest(proteins, "sha256").hexdigest()}:
                return None
            return {name: table[name] for name in ("contig", "begin", "end", "strand", "gaps")}
    except Exception:  # whatever is there, it is not what this program wrote
        return None


def _check_free(paths: Paths, config: EmbedConfig) -> None:
    """Raise UserError if a file is in the way. The table comes first, so one without proteins is what a kill left."""
    replace = config.overwrite and not config.dry_run
    for path in (paths.proteins, paths.table):
        if path.exists() and not replace and (path == paths.proteins or not _is_ours(path)):
            raise UserError(
                f"{path} exists, and is not of these contigs and settings.",
                "Move it away, choose another -o, or --overwrite it.",
            )


def _is_ours(table: Path) -> bool:
    try:
        with np.load(table, allow_pickle=False) as there:
            return "made_of" in there
    except Exception:  # another file
        return False


def _make(
    paths: Paths, contigs: fasta.RecordTable, config: EmbedConfig, made_of: dict[str, Any], out: Console
) -> dict[str, NDArray[Any]]:
    """Find the proteins, and write them and their table, each whole or not at all.

    Returns int64 contig, begin and end and int8 strand of each protein, and int64 gaps, the bases of each contig that lie in gaps.
    """
    contig, begin, end, strand, gaps = array("q"), array("q"), array("q"), array("b"), array("q")
    sha = hashlib.sha256()
    with (
        disk.written_whole(paths.proteins) as file,
        report.Tracker(out, max(1, contigs.residues), "bases") as tracker,
    ):
        for number, (found, in_gaps) in enumerate(_called(contigs, CALLERS[config.genes].Caller(config))):
            sha.update(found.text)
            file.write(found.text)
            contig.extend([number] * len(found.begin))
            gaps.append(in_gaps)
            for column, values in ((begin, found.begin), (end, found.end), (strand, found.strand)):
                column.frombytes(values.tobytes())
            tracker.advance(int(contigs.length[number]))
        contigs.check_unchanged()
        if not contig:
            inputs = ", ".join(source.path for source in contigs.sources)
            raise UserError(
                f"No protein was found in the {counted(len(contigs), 'contig')} of {inputs} by --genes {config.genes}.",
                "Are they long enough? --genes six-frame with a small --min-aa finds the most.",
            )
        columns: dict[str, Any] = {"contig": contig, "begin": begin, "end": end, "strand": strand, "gaps": gaps}
        columns = {name: np.frombuffer(values, values.typecode) for name, values in columns.items()}
        with disk.written_whole(paths.table) as table:
            made = json.dumps(made_of | {"proteins_sha256": sha.hexdigest()})
            np.savez(table, made_of=np.array(made), **columns)
    return columns


def _called(contigs: fasta.RecordTable, caller: Any) -> Iterator[tuple[Genes, int]]:
    """The proteins of each contig and how many of its bases lie in gaps, in order; a thread for each core."""

    def of(name: str, sequence: bytes) -> tuple[Genes, int]:
        return caller(name, sequence), sum(stop - start for start, stop in codons.gaps(sequence))

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[tuple[Genes, int]]] = deque()
    try:
        for name, sequence in _contigs(contigs):
            waiting.append(pool.submit(of, name, sequence))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _contigs(contigs: fasta.RecordTable) -> Iterator[tuple[str, bytes]]:
    for block in store.blocks(len(contigs)):
        names, letters = contigs.names(block.start, block.stop), contigs.letters(np.arange(block.start, block.stop))
        for name, text in zip(names, letters, strict=True):
            if odd := text.translate(None, NUCLEOTIDES):
                raise UserError(
                    f"Contig {name!r} holds {odd[:1].decode('latin-1')!r}, which stands for no nucleotide.",
                    "For proteins leave out --from contigs; otherwise correct the file.",
                )
            yield name, text.replace(b"U", b"T")
