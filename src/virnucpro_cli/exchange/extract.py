"""The extract workflow: embed into a hidden file, and from that the tree of fair-esm's scripts/extract.py, a .pt for each protein.

The hidden file lies in the output directory until the tree is whole: an interrupted run resumes from it.
"""

import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import embed, fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import Busy, Stopped, UserError, counted, unread
from virnucpro_cli.exchange.layouts.layout import encodable
from virnucpro_cli.model import locate

ENTRIES = {
    "per_tok": ("representations", "residue"),
    "mean": ("mean_representations", "mean"),
    "bos": ("bos_representations", "bos"),
}
"""What --include asks for: its entry in the files, and the kind of --pool that it is."""

LONGEST_NAME, LONGEST_PATH = 255, 1024
BLOCK = 256


@dataclass(frozen=True)
class Written:
    """Files written, and records without any: they have no residues, or no finite embedding."""

    files: int
    skipped: int


def run(
    model: str, path: str, output: str, include: tuple[str, ...], *, layers: tuple[int, ...] = (-1,), longest: int = 1022,
    tokens: int | None = None, gpu: bool = True, out: Console | None = None,
) -> Written:  # fmt: skip
    """Do what `virnucpro extract` does. longest: residues seen of a protein; tokens: of a pack.

    Each file is a dict of `label` (str), and as far as included `representations` {layer: [L, D]}, `mean_representations`
    and `bos_representations` {layer: [D]}, `contacts` [L, L], all float32 (fair-esm's scripts/extract.py).
    Raises UserError for what the user can put right, headers that occur twice among it.
    """
    out = out or report.console()
    folder = _folder(Path(output))
    if path == "-" or not os.path.isfile(path):
        with tempfile.TemporaryDirectory(prefix="virnucpro-extract-") as spool:
            copy = _spooled(path, Path(spool))
            return run(
                model, copy, output, include, layers=layers, longest=longest, tokens=tokens, gpu=gpu, out=out
            )  # fmt: skip
    kinds = tuple(kind for name, (_, kind) in ENTRIES.items() if name in include)
    settings = EmbedConfig(
        inputs=(path,), model=model, layers=layers, pool=kinds or ("bos",), dtype="fp32", store_dtype="fp32",
        emit=("contacts",) if "contacts" in include else (), device="auto" if gpu else "cpu",
        token_budget="auto" if tokens is None else max(tokens, 1024), max_residues=longest, id="full", force_protein=True,
    )  # fmt: skip
    own = (
        folder
        / f".virnucpro-{_key(os.path.realpath(path))}-{_key(model, _state(path), kinds, layers, longest, include)}"
    )
    with _alone(own, path):
        table = fasta.index(fasta.open_sources([path], folder))
        labels = _labels(table, path)
        places = paths_of(labels)
        _check_places(folder, places, [path, *locate.files_read(model)])
        moved = [i for i, label in enumerate(labels) if str(places[i]) != f"{label}.pt"]
        if moved:
            out.print(
                f"{counted(len(moved), 'header')} impossible as names of files in {folder}; the first, {labels[moved[0]][:80]!r}, is in {places[moved[0]]}",
                style="yellow",
            )
        _discard_others(own)
        hidden = own.with_suffix(".h5")
        embed.run(replace(settings, output=str(hidden)), out)
        done = _write(hidden, include, labels, places, own.with_suffix(".tmp"), out)
        hidden.unlink(missing_ok=True)
    written = Written(int(done.sum()), int((~done).sum()))
    out.print(f"{folder}: {counted(written.files, 'file')}")
    if written.skipped:
        out.print(f"{counted(written.skipped, 'protein')} without a file: empty, or not finite", style="yellow")
    return written


def _write(
    hidden: Path, include: tuple[str, ...], labels: list[str], places: list[Path], new: Path, out: Console
) -> NDArray[np.bool_]:
    """Write the file of each record, first as `new`, and have all on disk. Returns bool [N]: which records have a file."""
    try:
        with store.read_embeddings(hidden) as file, report.Tracker(out, len(file), "files") as tracker:
            done = file.status == store.DONE
            if file.contact_maps is not None and file.contact_maps.pending:
                raise UserError(
                    f"The contacts of {counted(file.contact_maps.pending, 'protein')} do not fit the memory of the device.",
                    "Use a smaller --truncation_seq_length or a larger device, or leave contacts out.",
                )
            for rows in store.blocks(len(file), BLOCK):
                entries = _entries(file, include, rows)
                for i in range(rows.start, rows.stop):
                    if done[i]:
                        content = {"label": labels[i], **{key: of(i) for key, of in entries.items()}}
                        _save(hidden.parent / places[i], new, content)
                tracker.advance(rows.stop - rows.start)
    except Stopped as stop:
        stop.resumable = True
        raise
    os.sync()  # all of the tree is on disk before what it is made from goes
    return done


def _folder(folder: Path) -> Path:
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # a link may name a folder that is not there yet
    except OSError as error:
        raise UserError(f"The directory {folder} cannot be made: {error.strerror}.", "Choose another OUTDIR.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The directory {folder} cannot be written.", "Choose another OUTDIR.")
    return folder


@contextmanager
def _alone(own: Path, path: str) -> Iterator[None]:
    """Hold the lock of this run's hidden files. Raises UserError if another process has it."""
    try:
        held, _ = store.create_locked(own.with_suffix(".lock"))
    except Busy:
        raise UserError(f"Another extract of {path} is writing into {own.parent} now.", "Wait for it to end.") from None
    try:
        yield
    finally:
        own.with_suffix(".lock").unlink(missing_ok=True)
        os.close(held)


def _discard_others(own: Path) -> None:
    """Remove the hidden files that interrupted runs of the same FASTA with other arguments left, unless they are alive."""
    same = own.name.rpartition("-")[0]
    for other in {path.with_name(path.name.partition(".h5")[0]) for path in own.parent.glob(f"{same}-*.h5*")} - {own}:
        try:
            held, _ = store.create_locked(other.with_suffix(".lock"))
        except UserError:
            continue
        try:
            hidden = other.with_suffix(".h5")
            for path in (hidden, store.partial_path(hidden), other.with_suffix(".tmp"), other.with_suffix(".lock")):
                path.unlink(missing_ok=True)
        finally:
            os.close(held)


def _state(path: str) -> tuple[int, int]:
    """Size and time of an input, so that only a run of the same content is resumed."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"The FASTA {unread(path, error)}.") from None
    return status.st_size, status.st_mtime_ns


def _key(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def _spooled(path: str, spool: Path) -> str:
    """A copy of standard input or of a pipe, which is read twice here. Raises UserError if it cannot be read."""
    copy = spool / "standard-input.fasta"
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as source, open(copy, "wb") as into:
            shutil.copyfileobj(source, into)
    except OSError as error:
        raise UserError(f"The FASTA {unread(path, error)}.") from None
    return str(copy)


def _check_places(folder: Path, places: list[Path], read: list[str | Path]) -> None:
    """Raise UserError if the file of a header would replace one that is read, or lies outside of the folder."""
    taken, inside = {os.path.realpath(path) for path in read}, folder.resolve()
    for parent in sorted({place.parent for place in places}):
        if not (folder / parent).resolve().is_relative_to(inside):
            raise UserError(
                f"{folder / parent} leads out of {folder}.", "Take the link away, or choose another OUTDIR."
            )
    for place in places:
        if os.path.realpath(folder / place) in taken:
            raise UserError(f"{folder / place} would be replaced, which this run reads.", "Choose another OUTDIR.")


def _labels(table: fasta.RecordTable, path: str) -> list[str]:
    """The whole header of every record; of an empty one `seqnum` and the number of its line, as in fair-esm."""
    labels = table.names(0, len(table), full=True)
    if "" in labels:
        with open(path, "rb") as raw, io.TextIOWrapper(fasta.decompressed(raw), "latin-1") as lines:
            headers = [number for number, line in enumerate(lines) if line.startswith(">")]
        labels = [label or f"seqnum{line:09d}" for label, line in zip(labels, headers, strict=True)]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} has {counted(len(twice), 'header')} more than once, first {twice[0][:80]!r}; a header is the name of a file.",
            "Make them differ, or use virnucpro embed, which keeps one row for each record.",
        )
    return labels


def paths_of(labels: list[str]) -> list[Path]:
    """Where the file of each label is, below the output directory and all different: `{label}.pt`, nested where it has a `/`.

    A label that would leave the directory, or is too long for a file's name, is changed as little as that needs.
    """
    paths = [_below(f"{label}.pt") for label in labels]
    taken = {parent.as_posix() for path in paths for parent in Path(path).parents}  # no file can have a folder's name
    found = []
    for label, path in zip(labels, paths, strict=True):
        if path in taken:
            path = f"{path[:-3]}-{_short_hash(label)}.pt"
        taken.add(path)
        found.append(Path(path))
    return found


def _below(path: str) -> str:
    parts = [encodable(part.replace("\0", "_")) for part in path.split("/") if part not in ("", ".")]
    whole = "/".join(_fitting("__" if part == ".." else part, LONGEST_NAME) for part in parts)
    return whole if len(os.fsencode(whole)) <= LONGEST_PATH else _fitting(whole.replace("/", "_"), LONGEST_NAME)


def _fitting(name: str, size: int) -> str:
    """The name, or if it is too long its beginning and a hash, with the same end."""
    if len(os.fsencode(name)) <= size:
        return name
    end = f"-{_short_hash(name)}{'.pt' if name.endswith('.pt') else ''}"
    return name.encode()[: size - len(end)].decode(errors="ignore") + end


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _entries(file: store.EmbeddingFile, include: tuple[str, ...], rows: slice) -> dict[str, Callable[[int], Any]]:
    """For each entry of the files but the label, what it is of a record among `rows`."""

    def of_kind(kind: str) -> Callable[[int], Any]:
        if kind == "residue":
            return lambda i: {layer: torch.from_numpy(file.residues(i, layer)) for layer in file.layers}
        block: dict[int, NDArray[np.float32]] = {layer: file.dataset(kind, layer)[rows] for layer in file.layers}
        return lambda i: {layer: torch.from_numpy(each[i - rows.start].copy()) for layer, each in block.items()}

    entries = {key: of_kind(kind) for name, (key, kind) in ENTRIES.items() if name in include}
    if "contacts" in include:
        entries["contacts"] = lambda i: torch.from_numpy(file.contacts(i))
    return entries


def _save(target: Path, new: Path, content: dict[str, Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, new)
        os.replace(new, target)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        new.unlink(missing_ok=True)
        raise UserError(
            f"{target} cannot be written: {str(error).splitlines()[0]}.",
            "Put that right, then run the same command again; the embeddings are kept.",
        ) from None
