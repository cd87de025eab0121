"""The extract workflow: `embed` into a hidden file, and of it the files of fair-esm's scripts/extract.py.

The hidden file lies in the output directory until the tree is whole: an interrupted run resumes from it.
"""

import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from virnucpro_cli import embed, report, store
from virnucpro_cli.alphabet import ESM
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, counted, unread
from virnucpro_cli.exchange.layouts import fair_esm, pt
from virnucpro_cli.exchange.layouts.layout import Keys, Selection
from virnucpro_cli.fasta import RecordTable, decompressed, index, open_sources
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.families import reading
from virnucpro_cli.stopping import resumable
from virnucpro_cli.store.disk import alone

INCLUDED = {"per_tok": "residue", "mean": "mean", "bos": "bos"}
"""Kind of --pool that --include asks for; contacts are none."""


@dataclass(frozen=True)
class Written:
    """Files written, and records without any: they have no residues, or no finite embedding."""

    files: int
    skipped: int


def extract_files(
    model: str, fasta: str, output: str, include: Sequence[str], *, layers: Sequence[int] = (-1,), longest: int = 1022,
    tokens: int | None = None, gpu: bool = True,
) -> Written:  # fmt: skip
    """Do what `virnucpro extract` does. longest: residues seen of a protein; tokens: of a pack.

    Each file is a dict of `label` (str) and, as far as included, float32 tensors: `representations` {layer: [L, D]},
    `mean_representations` and `bos_representations` {layer: [D]}, `contacts` [L, L] (fair-esm's scripts/extract.py).
    Raises UserError for what the user can put right, such as a header that occurs twice.
    """
    out, folder, include, layers = report.console(), Path(output), tuple(include), tuple(layers)
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # a link may name a folder that is not there yet
    except OSError as error:
        raise UserError(f"The directory {folder} cannot be made: {error.strerror}.", "Choose another OUTDIR.") from None
    with _readable_twice(fasta) as proteins:
        table = index(open_sources([proteins], folder))
        labels = _labels(table, proteins)
        same, this = _key(os.path.realpath(fasta)), _key(model, table.sha256, layers, longest, include)
        own = folder / f".virnucpro-{same}-{this}"
        with _locked(own, fasta):
            paths = _paths(labels, folder, [fasta, *locate.files_read(model)], out)
            _check_family(model, out)
            _discard_others(own)
            hidden = own.with_suffix(".h5")
            embed.run(EmbedConfig(
                inputs=(proteins,), output=str(hidden), model=model, layers=layers, id="full", force_protein=True,
                pool=tuple(kind for name, kind in INCLUDED.items() if name in include) or ("bos",),
                emit=("contacts",) if "contacts" in include else (), dtype="fp32", store_dtype="fp32",
                device="auto" if gpu else "cpu", token_budget="auto" if tokens is None else max(tokens, 1024),
                max_residues=longest, long="truncate",
            ), out)  # fmt: skip
            written = _write(hidden, include, labels, paths, out)
            hidden.unlink(missing_ok=True)
    out.print(f"{folder}: {counted(written.files, 'file')}")
    if written.skipped:
        out.print(f"{counted(written.skipped, 'protein')} without a file: empty, or not finite", style="yellow")
    return written


def _check_family(model: str, out: Console) -> None:
    """Raise UserError for a model that does not read as fair-esm does."""
    spec = weights.spec_of(locate.fetch(model, lambda text: out.print(text)))
    if reading(spec) != ESM:
        raise UserError(
            f"{spec.name} has another alphabet than fair-esm, whose files extract writes.",
            "Use virnucpro embed, then virnucpro export to the layout fair-esm.",
        )


def _write(hidden: Path, include: Sequence[str], labels: list[str], paths: list[str], out: Console) -> Written:
    """Write the file of each record, and have all on disk."""
    with store.read_embeddings(hidden) as file, report.Tracker(out, len(file), "files") as tracker:
        if file.contact_maps is not None and file.contact_maps.pending:
            raise UserError(
                f"The contacts of {counted(file.contact_maps.pending, 'protein')} do not fit the memory of the device.",
                "Use a smaller --truncation_seq_length or a larger device, or leave contacts out.",
            )
        pool, layers = tuple(file.settings["pool"]), tuple(file.layers)
        selection = Selection(file, pool, layers, lambda a, b: paths[a:b], {}, tracker.advance)
        with resumable(True):
            for number, path, content in fair_esm.contents(selection):
                content["label"] = labels[number]
                if "bos" not in include:
                    content.pop(fair_esm.GROUPS["bos"], None)
                if "contacts" in include:
                    content["contacts"] = pt.tensor(file.contacts(number))
                _save(content, hidden.parent / f"{path}.pt", hidden.with_suffix(".tmp"))
            os.sync()  # all of the tree is on disk before what it is made from goes
        done = int((file.status == store.DONE).sum())
        return Written(done, len(file) - done)


def _save(content: dict[str, Any], target: Path, new: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        pt.save(content, new)
        os.replace(new, target)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        new.unlink(missing_ok=True)
        remedy = "Put that right, then run the same command again; the embeddings are kept."
        raise UserError(f"{target} cannot be written: {str(error).splitlines()[0]}.", remedy) from None


# --- hidden files ----------------------------------------------------------------------------------------------------


def _key(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def _locked(own: Path, path: str) -> AbstractContextManager[bool]:
    """Hold the lock of a run's hidden files. Raises UserError if another process has it."""
    words = f"Another extract of {path} is writing into {own.parent} now."
    return alone(own.with_suffix(".lock"), lambda _: None, words, "Choose another OUTDIR, or wait.", wait=False)


def _discard_others(own: Path) -> None:
    """Remove hidden files that interrupted runs of the same FASTA with other arguments left, unless they are alive."""
    same = own.name.rpartition("-")[0]
    for other in {path.with_name(path.name.partition(".h5")[0]) for path in own.parent.glob(f"{same}-*.h5*")} - {own}:
        with suppress(UserError), _locked(other, ""):
            hidden = other.with_suffix(".h5")
            for path in (hidden, store.partial_path(hidden), other.with_suffix(".tmp")):
                path.unlink(missing_ok=True)


# --- labels and paths ------------------------------------------------------------------------------------------------


@contextmanager
def _readable_twice(path: str) -> Iterator[str]:
    """The path, or a copy of standard input or of a pipe. Raises UserError if that cannot be read."""
    if path != "-" and os.path.isfile(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="virnucpro-extract-") as spool:
        copy = os.path.join(spool, "standard-input.fasta")
        try:
            with sys.stdin.buffer if path == "-" else open(path, "rb") as source, open(copy, "wb") as into:
                shutil.copyfileobj(source, into)
        except OSError as error:
            raise UserError(f"The FASTA {unread(path, error)}.") from None
        yield copy


def _labels(table: RecordTable, path: str) -> list[str]:
    """The whole header of every record; of an empty one `seqnum` and the number of its line, as in fair-esm."""
    labels = table.names(0, len(table), full=True)
    if "" in labels:
        with open(path, "rb") as raw, io.TextIOWrapper(decompressed(raw), "latin-1") as lines:
            headers = [number for number, line in enumerate(lines) if line.startswith(">")]
        labels = [label or f"seqnum{line:09d}" for label, line in zip(labels, headers, strict=True)]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        headers_twice = f"{counted(len(twice), 'header')} more than once, first {twice[0][:80]!r}"
        raise UserError(
            f"{path} has {headers_twice}; a header is the name of a file.",
            "Make them differ, or use virnucpro embed, which keeps one row for each record.",
        )
    return labels


def _paths(labels: list[str], folder: Path, read: list[str | Path], out: Console) -> list[str]:
    """The path of each record's file below the folder, without its .pt.

    Raises UserError for a file that is read, and for a link that leads out of the folder.
    """
    paths, inside = paths_of(labels, out), folder.resolve()
    for parent in sorted({os.path.dirname(path) for path in paths}):
        if not (folder / parent).resolve().is_relative_to(inside):
            what = f"{folder / parent} leads out of {folder}."
            raise UserError(what, "Take the link away, or choose another OUTDIR.")
    taken = {os.path.realpath(path) for path in read}
    for path in paths:
        if os.path.realpath(folder / f"{path}.pt") in taken:
            raise UserError(f"{folder / path}.pt would be replaced, which this run reads.", "Choose another OUTDIR.")
    return paths


def paths_of(labels: list[str], out: Console) -> list[str]:
    """The path of each label's file, without its .pt: all different, and none is the folder of another.

    `out` is told what was changed.
    """
    nested = [fair_esm.path_of(label, fair_esm.LONGEST_PART) for label in labels if "/" in label]
    folders = {parent.as_posix() for path in nested for parent in Path(path).parents}

    def path_of(label: str, longest: int) -> str:
        path = fair_esm.path_of(label, longest)
        while f"{path}.pt" in folders:
            path += "_"
        return path

    keys = Keys(lambda a, b: labels[a:b], len(labels), fair_esm.LONGEST_PART, path_of)
    paths = keys(0, len(labels))
    if keys.changed:
        out.print(keys.described, style="yellow")
    return paths
