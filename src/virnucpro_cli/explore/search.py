"""The search workflow: for each query the nearest rows of an embeddings file, by cosine, exactly.

Products are in fp32, on the GPU if there is one; whatever could be among the first k is computed again in fp64, so that
neither the device nor the order of a sum decides who is nearer.
"""

import dataclasses
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import embed, report, scratch, store, tables
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import Stopped, UserError, absent, counted, unread
from virnucpro_cli.explore import default_rows
from virnucpro_cli.explore.default_rows import Pooled
from virnucpro_cli.model import locate
from virnucpro_cli.model.esm2 import exact_arithmetic
from virnucpro_cli.validation import audit

COLUMNS = ("query", "hit", "rank", "cosine", "query_length", "hit_length")
MOST_HITS = 10_000
QUERIES, HITS = 1024, 1 << 20
"""Queries, and hits of them, that are searched for in one pass over the file."""
PAIRS = 4096
"""Pairs that are computed in fp64 at a time."""
FEW = 10
"""Proteins up to which their mean says little."""
SAME = ("max_residues", "long", "overlap", "invalid", "gaps")
"""Settings that another file should share, for its rows to be compared with these."""


@dataclass(frozen=True)
class Queries:
    """Rows to search with. own: whether they are rows of the database itself, which are then no hits of their own."""

    data: Pooled
    own: bool


def search_file(
    database: str, query: str, k: int = 10, raw: bool = False, output: str | None = None, model: str | None = None,
    overwrite: bool = False, force_protein: bool = False, kind: str | None = None, layer: int | None = None,
    out: Console | None = None,
) -> int:  # fmt: skip
    """Write the nearest k rows of `database` for each query as tab-separated text to `output`, or standard output.

    query: a FASTA (embedded with the database's own model and settings), a name in the database, or another embeddings
    file. kind, layer: the rows compared, by default those of /embeddings. Cosines are of rows minus the database's mean row, unless raw. Returns the number of queries without a row.
    Raises UserError for what the user can put right.
    """
    out = out or report.console()
    if not 1 <= k <= MOST_HITS:
        raise UserError(f"-k is {k}.", f"Give 1 to {MOST_HITS:,}.")
    if output is not None:
        report.check_places({"output": output}, [database, *([query] if os.path.exists(query) else [])])
        store.check_new(Path(output), overwrite)
    with ExitStack() as stack:
        file = stack.enter_context(store.opened(database))
        report.check_places({"output": output}, [*locate.files_read(audit.model_of(file, model))])
        data = default_rows.of(file, database, kind, layer)
        if not len(data):
            raise UserError(f"{database} holds no embedded protein.", "Its proteins were skipped, or not computed yet.")
        if left_out := default_rows.lacking(data):
            out.print(f"not searched: {left_out}", style="yellow")
        if len(data) < FEW and not raw:
            out.print(f"The mean of {counted(len(data), 'protein')} says little; --raw does without.", style="yellow")
        queries = _queries(data, database, query, model, force_protein, stack, out)
        lacking = len(queries.data.file) - len(queries.data) if not queries.own else 0
        if lacking:
            out.print(f"{counted(lacking, 'protein')} of the query skipped, without hits", style="yellow")
        device = devices.resolve_device("auto")
        exact_arithmetic()
        mean = np.zeros(data.array.shape[1]) if raw else data.mean()
        out.print(
            f"searching {counted(len(data), 'protein')} for {counted(len(queries.data), 'protein')} on {device.type}",
            style="dim",
        )
        writer = sys.stdout.buffer if output is None else stack.enter_context(store.new_file(Path(output), overwrite))
        on_terminal = output is None and sys.stdout.isatty()
        asked = dataclasses.replace(queries.data, size=min(QUERIES, HITS // k))
        total = len(data) * -(-len(asked) // asked.size)
        tracker = stack.enter_context(report.Tracker(report.console(on_terminal or out.quiet), total, "rows"))
        lines = stack.enter_context(tables.written_to(writer))
        lines.writerow(COLUMNS)
        for rows, values in asked.blocks():
            own = rows if queries.own else np.full(len(rows), -1)
            found, cosines = nearest(
                data, directions(values.astype(np.float64), mean), own, k, mean, device, tracker.advance
            )
            _write(lines, file, queries.data.file, rows, found, cosines)
    if output is None:
        writer.flush()
    else:
        out.print(f"{output}: {counted(len(queries.data), 'query', 'queries')}")
    return lacking


def directions(values: Any, mean: Any) -> Any:
    """Rows float64 [m, D] minus the mean, of length 1; one that is the mean itself has no direction, and is zero. Of NumPy or
    of PyTorch.
    """
    centred = values - mean
    norm = (centred * centred).sum(1, keepdims=True) ** 0.5
    some = norm > 1e-9 * (mean * mean).sum() ** 0.5
    return centred * (some / (norm + ~some))


def nearest(
    data: Pooled, queries: NDArray[np.float64], own: NDArray[np.int64], k: int, mean: NDArray[np.float64],
    device: torch.device, advance: Any = lambda rows: None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """The k rows of largest cosine with each query, in falling order, equal ones by row number.

    queries: float64 [m, D], see `directions`; own: int64 [m], a row that is no hit of its query. Returns row numbers int64
    [m, k], -1 where there are fewer, and cosines float64 [m, k].
    """
    rows = np.full((len(queries), k), -1)
    cosines = np.full((len(queries), k), -np.inf)
    slack = (queries.shape[1] + 16) * 2.0**-23  # more than an fp32 product of two such directions can be off
    single = torch.from_numpy(queries).to(device).float()
    mean_there = torch.from_numpy(mean).to(device)
    for numbers, values in data.blocks():
        product = single @ directions(torch.from_numpy(values).to(device).double(), mean_there).float().T
        enough = min(k + 1, len(numbers))  # one more, for a query's own row
        floor = product.topk(enough, dim=1, sorted=False).values.min(dim=1).values
        floor = torch.maximum(floor, torch.from_numpy(cosines[:, -1]).to(device).float()) - slack
        query, place = (product >= floor[:, None]).nonzero(as_tuple=True)
        q, p = query.cpu().numpy(), place.cpu().numpy()
        foreign = numbers[p] != own[q]
        q, p = q[foreign], p[foreign]
        exact = [
            np.einsum("ij,ij->i", queries[q[part]], directions(values[p[part]].astype(np.float64), mean))
            for part in store.blocks(len(q), PAIRS)
        ]
        _keep_best(rows, cosines, q, numbers[p], np.concatenate([np.empty(0), *exact]))
        advance(len(numbers))
    return rows, cosines


def _keep_best(
    rows: NDArray[np.int64], cosines: NDArray[np.float64], q: NDArray[np.int64], new: NDArray[np.int64],
    exact: NDArray[np.float64],
) -> None:  # fmt: skip
    """Merge new hits (query, row, cosine) into the best so far, in place."""
    m, k = rows.shape
    q = np.concatenate([np.repeat(np.arange(m), k), q])
    new, exact = np.concatenate([rows.ravel(), new]), np.concatenate([cosines.ravel(), exact])
    order = np.lexsort((new, -exact, q))  # no hit (-1, of cosine -inf) stands last
    first = np.searchsorted(q[order], np.arange(m))
    best = order[first[:, None] + np.arange(k)]
    rows[:], cosines[:] = new[best], exact[best]


# --- queries and hits ------------------------------------------------------------------------------------------------


def _queries(
    data: Pooled, database: str, query: str, model: str | None, force_protein: bool, stack: ExitStack, out: Console
) -> Queries:  # fmt: skip
    """What the word after --query stands for. A file of that name comes before a protein of that name."""
    if query != "-" and not os.path.exists(query):
        if os.path.islink(query):
            raise UserError(f"The query {absent(query)}.", "Put the file there, or name another.")
        named = data.file.find(query)
        if not named:
            raise UserError(
                f"--query is {query!r}, which is neither a file nor a protein of {database}.",
                "virnucpro inspect --qc FILE.tsv lists the names.",
            )
        rows = np.intersect1d(named, data.rows)
        if not len(rows):
            raise UserError(f"{query} was skipped, or is not computed yet: it has no row.", "Choose another query.")
        return Queries(dataclasses.replace(data, rows=rows), own=True)
    if query != "-" and _is_hdf5(query):
        if os.path.samefile(query, database):
            return Queries(data, own=True)
        return Queries(_of_file(data, database, query, stack, out), own=False)
    return Queries(_embedded(data, database, query, model, force_protein, stack, out), own=False)


def _is_hdf5(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(store.HDF5_MAGIC)) == store.HDF5_MAGIC
    except OSError as error:
        raise UserError(
            f"The query {unread(path, error)}.", "Give a FASTA file, a file of embed, or a protein's name."
        ) from None


def _of_file(data: Pooled, database: str, query: str, stack: ExitStack, out: Console) -> Pooled:
    other = stack.enter_context(store.opened(query))
    ours, theirs = data.file.settings, other.settings
    if _other_model(ours, theirs):
        raise UserError(
            f"{query} was made with other weights than {database}.", "Embed the queries with the same --model."
        )
    if data.kind not in theirs["pool"] or data.layer not in theirs["layers"]:
        raise UserError(
            f"{query} has no {data.kind}/{data.layer}, which {database} is searched by.",
            f"Embed it with --pool {data.kind} --layers {data.layer}.",
        )
    for name in SAME:
        if ours.get(name) != theirs.get(name):
            out.print(f"{name} is {ours.get(name)} in {database}, {theirs.get(name)} in {query}", style="yellow")
    done = np.flatnonzero(other.status == store.DONE)
    return Pooled(other, data.kind, data.layer, other.array(data.kind, data.layer), done)


def _embedded(
    data: Pooled, database: str, query: str, model: str | None, force_protein: bool, stack: ExitStack, out: Console
) -> Pooled:  # fmt: skip
    """A FASTA, embedded as the database was, in a file that is removed in the end."""
    settings = data.file.settings
    found = audit.weights_of(data.file, database, model, out)
    if found.sha256 != settings["weights_sha256"]:
        raise UserError(
            f"{database} was made with other weights than those of {found.place}.",
            f"Say where the weights of SHA-256 {settings['weights_sha256'][:16]}... are: --model PATH.",
        )
    dtype = devices.short_name(getattr(torch, settings["dtype"]))
    if settings["device"] != devices.resolve_device("auto").type:
        dtype = "auto"
    folder = stack.enter_context(scratch.folder())
    policies = {name: settings[name] for name in (*SAME, "id", "dedup") if name in settings}
    config = resolve(EmbedConfig, None, {
        "inputs": query, "output": str(Path(folder) / "queries.h5"), "model": audit.model_of(data.file, model),
        "layers": data.layer, "pool": data.kind, "dtype": dtype, "store_dtype": settings["store_dtype"], "quiet": True, "force_protein": force_protein, **policies,
    })  # fmt: skip
    out.print(f"embedding {'standard input' if query == '-' else query} with {found.place}", style="dim")
    try:
        embed.run(config)
    except UserError as error:
        if "--from contigs" not in error.remedy:
            raise
        raise UserError(
            error.what,
            "Queries are proteins: virnucpro embed --from contigs finds those of contigs. Or --force-protein.",
        ) from None
    except Stopped as stop:
        stop.resumable = False  # the folder goes
        raise
    file = stack.enter_context(store.read_embeddings(config.output))
    if _other_model(settings, file.settings):
        raise UserError(
            f"{database} was made with other weights than those of {found.place}: their heads differ.",
            "Put the config.json back that the weights had then.",
        )
    return default_rows.of(file, config.output)


def _other_model(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the weights or, where both files say it, the number of attention heads differ."""
    heads = {settings["heads"] for settings in (ours, theirs) if "heads" in settings}
    return ours["weights_sha256"] != theirs["weights_sha256"] or len(heads) > 1


def _write(
    lines: Any, base: store.EmbeddingFile, other: store.EmbeddingFile, queries: NDArray[np.int64],
    found: NDArray[np.int64], cosines: NDArray[np.float64],
) -> None:  # fmt: skip
    hit = found >= 0
    hits = iter(zip(_names(base, found[hit]), base.lengths[found[hit]].tolist(), cosines[hit].tolist(), strict=True))
    for name, length, count in zip(_names(other, queries), other.lengths[queries].tolist(), hit.sum(axis=1).tolist(), strict=True):  # fmt: skip
        for rank in range(1, count + 1):
            hit_name, hit_length, cosine = next(hits)
            lines.writerow((name, hit_name, rank, f"{cosine:.6f}", length, hit_length))


def _names(file: store.EmbeddingFile, rows: NDArray[np.int64]) -> list[str]:
    return [tables.cell(name) for name in file.names_at(rows)]
