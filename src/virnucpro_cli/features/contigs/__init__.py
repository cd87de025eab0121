"""From contigs to the FASTA of their proteins, which is then embedded as any other: OUT.proteins.faa beside OUT.h5.

OUT.proteins.npz beside it vouches for what it was made from, and holds where on the contigs the proteins lie.
With --nucleotide, OUT.slices.fna has the bases behind each protein.
"""

import hashlib
import json
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import DAMAGE, NoProteins, UserError, counted
from virnucpro_cli.features import Feature, Run
from virnucpro_cli.features.contigs import chunks, codons, pyrodigal_gv, six_frame
from virnucpro_cli.features.contigs.codons import Genes
from virnucpro_cli.stopping import cores, threads
from virnucpro_cli.store import disk

CALLERS: dict[str, Any] = {"pyrodigal-gv": pyrodigal_gv, "six-frame": six_frame, "virnucpro": chunks}
"""Each has `settings(config)`, all that its results depend on, `GAPS`, the words for gaps, and `Caller(config)`.
A caller takes name and sequence of a contig, in upper case with T for U, and returns Genes. Threads share it."""

LEAST_NUCLEOTIDES = 0.5
NUCLEOTIDES = b"ACGTURYSWKMBDHVNX-."
PROTEINS, SLICES = "proteins_sha256", "slices_sha256"
ENDINGS = ("proteins.faa", "proteins.npz", "slices.fna")
AHEAD = 4
"""Contigs in work or waiting for an earlier one, for each thread."""
COLUMNS = {"contig": "q", "begin": "q", "end": "q", "strand": "b", "gaps": "q"}
"""Columns of the table, and their types: int64 contig, begin and end, int8 strand of each protein; int64 gaps of each
contig, its bases that lie in gaps."""
Columns = dict[str, NDArray[Any]]
NO_TABLE = (*DAMAGE, MemoryError, zipfile.BadZipFile, zlib.error)
"""Errors of NumPy and JSON for a file that is no such table."""


class Paths(NamedTuple):
    """The files beside an output."""

    proteins: Path
    table: Path
    slices: Path

    def written(self, config: EmbedConfig) -> list[Path]:
        """The files that a run writes."""
        return [path for path in self if path != self.slices or config.nucleotide]


def paths_of(output: Path) -> Paths:
    """`out.h5` to `out.proteins.faa`, `out.proteins.npz` and `out.slices.fna`."""
    return Paths(*(output.with_name(f"{output.stem}.{ending}") for ending in ENDINGS))


class Contigs(Feature):
    """The proteins of contigs, which are embedded instead of the input."""

    def writes(self, whole: Path) -> list[Path]:
        """Raises UserError if they cannot be written, or the caller is not installed."""
        CALLERS[self.config.genes].settings(self.config)
        paths = paths_of(whole).written(self.config)
        for path in paths:
            disk.check_destination(path)
            if any(path.exists() and Path(name).exists() and path.samefile(name) for name in self.config.inputs):
                raise UserError(f"{path} is an input, and would be written.", "Choose another -o.")
        return paths

    def sources(
        self, sources: list[fasta.Source], whole: Path, out: Console, clock: report.Clock
    ) -> tuple[list[fasta.Source], store.Extra]:
        """The FASTA texts of the contigs' proteins, and what the output holds of the contigs.

        The proteins are found now, unless an earlier run has left them. One run does so at a time: of shards that begin
        together, the others wait for the first. Raises UserError for what is no contig, and without any protein.
        """
        paths, config = paths_of(whole), self.config
        caller = {"name": config.genes, **CALLERS[config.genes].settings(config)}
        with clock.stage("genes"):
            contigs = fasta.index(sources, dedup=False)
            _check(contigs)
            made_of = {"contigs_sha256": contigs.sha256, "gene_caller": caller}
            lock, waiting = disk.lock_of(paths.proteins), f"another run is making {paths.proteins}: waiting for it"
            with disk.alone(lock, lambda text: out.print(text, style="yellow"), waiting):
                vouched, columns = _vouched_for(paths, made_of)
                if not vouched >= set(paths.written(config)) - {paths.table}:
                    _check_free(paths, vouched, config)
                    columns = _make(paths, contigs, config, made_of, out)
                    proteins = counted(len(columns["contig"]), "protein")
                    out.print(f"{paths.proteins}: {proteins} of {counted(len(contigs), 'contig')}")
                else:
                    out.print(f"{paths.proteins} is of the same contigs and settings, and is used")
        names = store.Names(len(contigs), contigs.names, contigs.text_bytes - contigs.residues)
        in_gaps = columns.pop("gaps")
        return fasta.open_sources([str(paths.proteins)], whole.parent), store.Extra(
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

    def note(self, run: Run) -> str | None:
        """A sentence on the gaps of the contigs."""
        counts = run.layout.extra.counts
        if not counts["bases in gaps"]:
            return None
        with_gaps = f"{counts['contigs with gaps']:,} of {counted(counts['contigs'], 'contig')} with gaps"
        bases = f"{counts['bases in gaps']:,} bases in all"
        return f"{with_gaps} ({codons.GAP} or more N in a row), {bases}: {CALLERS[self.config.genes].GAPS}"


def _check(contigs: fasta.RecordTable) -> None:
    """Raise UserError for proteins, and for contigs that their names do not tell apart."""
    for source, share in zip(contigs.sources, contigs.nucleotide_share, strict=True):
        if share < LEAST_NUCLEOTIDES and contigs.residues:
            refusal = f"{source.path} does not look like contigs: {share:.1%} of its letters are A, C, G, T, U or N."
            raise UserError(refusal, "For proteins leave out --from contigs.")
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


def _read_table(path: Path) -> tuple[dict[str, Any], Columns] | None:
    """The settings that a table was made of, and its columns; None for another file, or none."""
    try:
        with np.load(path, allow_pickle=False) as table:
            return json.loads(str(table["made_of"])), {name: table[name] for name in COLUMNS}
    except NO_TABLE:
        return None


def _vouched_for(paths: Paths, made_of: dict[str, Any]) -> tuple[set[Path], Columns]:
    """The texts that are there as their table says, and its columns; nothing if it is not of these settings."""
    there = _read_table(paths.table)
    if there is None or made_of != {name: each for name, each in there[0].items() if name in made_of}:
        return set(), {}
    vouched = set()
    for path, name in ((paths.proteins, PROTEINS), (paths.slices, SLICES)):
        with suppress(OSError):
            if disk.sha256(path) == there[0].get(name):
                vouched.add(path)
    return vouched, there[1]


def _check_free(paths: Paths, vouched: set[Path], config: EmbedConfig) -> None:
    """Raise UserError if a file is in the way. The table comes first, so one without proteins is what a kill left."""
    if config.overwrite and not config.dry_run:
        return
    for path in paths.written(config):
        is_free = path in vouched if path != paths.table else _read_table(path) is not None
        if path.exists() and not is_free:
            refusal = f"{path} exists, and is not of these contigs and settings."
            raise UserError(refusal, "Move it away, choose another -o, or --overwrite it.")


def _make(
    paths: Paths, contigs: fasta.RecordTable, config: EmbedConfig, made_of: dict[str, Any], out: Console
) -> Columns:
    """Find the proteins, and write them and their table, each whole or not at all. Returns the columns of the table."""
    written: dict[str, array[int]] = {name: array(code) for name, code in COLUMNS.items()}
    sha, sha_of_slices = hashlib.sha256(), hashlib.sha256()
    caller, bases = CALLERS[config.genes].Caller(config), max(1, contigs.residues)
    with ExitStack() as files:
        file = files.enter_context(disk.written_whole(paths.proteins))
        slices = files.enter_context(disk.written_whole(paths.slices)) if config.nucleotide else None
        tracker = files.enter_context(report.Tracker(out, bases, "bases"))
        for number, (genes, in_gaps) in enumerate(_called(contigs, caller)):
            sha.update(genes.text)
            file.write(genes.text)
            if slices is not None:
                sha_of_slices.update(genes.slices)
                slices.write(genes.slices)
            written["contig"].extend([number] * len(genes.begin))
            written["gaps"].append(in_gaps)
            for name in ("begin", "end", "strand"):
                written[name].frombytes(getattr(genes, name).tobytes())
            tracker.advance(int(contigs.length[number]))
        contigs.check_unchanged()
        if not written["contig"]:
            inputs = ", ".join(source.path for source in contigs.sources)
            number_of = counted(len(contigs), "contig")
            raise NoProteins(
                f"No protein was found in the {number_of} of {inputs} by --genes {config.genes}.",
                "Are they long enough? --genes six-frame with a small --min-aa finds the most.",
                contigs.names(0, len(contigs), full=config.id == "full"),
            )
        columns: dict[str, Any] = {name: np.frombuffer(column, column.typecode) for name, column in written.items()}
        with disk.written_whole(paths.table) as table:
            sums = {PROTEINS: sha.hexdigest()} | ({SLICES: sha_of_slices.hexdigest()} if config.nucleotide else {})
            np.savez(table, made_of=np.array(json.dumps(made_of | sums)), **columns)
    return columns


def _called(contigs: fasta.RecordTable, caller: Any) -> Iterator[tuple[Genes, int]]:
    """The proteins of each contig and how many of its bases lie in gaps, in order; a thread for each core."""

    def of(name: str, sequence: bytes) -> tuple[Genes, int]:
        return caller(name, sequence), sum(stop - start for start, stop in codons.gaps(sequence))

    most = cores()
    waiting: deque[Future[tuple[Genes, int]]] = deque()
    with threads(most) as pool:
        for name, sequence in _contigs(contigs):
            waiting.append(pool.submit(of, name, sequence))
            if len(waiting) > AHEAD * most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _contigs(contigs: fasta.RecordTable) -> Iterator[tuple[str, bytes]]:
    for block in store.blocks(len(contigs)):
        names, letters = contigs.names(block.start, block.stop), contigs.letters(np.arange(block.start, block.stop))
        for name, text in zip(names, letters, strict=True):
            if odd := text.translate(None, NUCLEOTIDES):
                refusal = f"Contig {name!r} holds {odd[:1].decode('latin-1')!r}, which stands for no nucleotide."
                raise UserError(refusal, "For proteins leave out --from contigs; otherwise correct the file.")
            yield name, text.replace(b"U", b"T")
