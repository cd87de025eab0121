"""The search workflow: for each query the nearest rows of an embeddings file, by cosine, exactly.

Products are in fp32, on the GPU if there is one. Whatever could be among the first k is computed again in fp64, once
all rows were seen, so that neither the device nor the order of a sum decides who is nearer.
"""

import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import embed, report, scratch, store, tables
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, absent, counted, unread
from virnucpro_cli.explore import SearchConfig, default_rows
from virnucpro_cli.explore.default_rows import Pooled
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.stopping import resumable
from virnucpro_cli.validation import audit

COLUMNS = ("query", "hit", "rank", "cosine", "query_length", "hit_length")
QUERIES, HITS = 1 << 14, 1 << 20
"""Queries, and hits of them, that are searched for in one pass over the file."""
TILE = 2048
"""Queries that are multiplied with a block of rows at a time."""
MANY = 4
"""Times as many likely hits as are asked for, from which on a block's own best narrow them down."""
MOST_LIKELY = 1 << 22
"""Likely hits that are held before those are dropped that later ones have overtaken."""
PAIRS = 4096
"""Pairs that are computed in fp64 at a time."""
FEW = 10
"""Proteins up to which their mean says little."""
SAME = ("max_residues", "long", "overlap", "invalid", "gaps", "kind")
"""Settings that another file should share, for its rows to be compared with these."""


def search_file(settings: SearchConfig) -> int:
    """Write the nearest rows of a file for each query as tab-separated text.

    Cosines are of rows minus the file's mean row, unless raw. A FASTA query is embedded as the file was.
    Returns the number of queries without a row. Raises UserError for what the user can put right.
    """
    out, database, output, k = report.console(), settings.file, settings.output, settings.k
    with ExitStack() as stack:
        file = stack.enter_context(store.opened(database))
        named = [settings.query] if os.path.exists(settings.query) else []
        model_files = audit.model_files(file, settings.model, settings.adapter)
        report.check_places({"output": output}, [database, *named, *model_files])
        if output is not None:
            store.check_new(Path(output), settings.overwrite)
        data = default_rows.of(file, settings.kind, settings.layer)
        if not len(data):
            raise UserError(f"{database} holds no embedded protein.", "Its proteins were skipped, or not computed yet.")
        if left_out := data.lacking():
            out.print(f"not searched: {left_out}", style="yellow")
        word, _ = file.words
        if len(data) < FEW and not settings.raw:
            out.print(f"The mean of {counted(len(data), word)} says little; --raw does without.", style="yellow")
        queries = _queries(data, settings, stack, out)
        queries = dataclasses.replace(queries, size=min(QUERIES, HITS // k))
        lacking = 0 if queries.file is file else len(queries.file) - len(queries)
        if lacking:
            out.print(f"{counted(lacking, word)} of the query skipped, without hits", style="yellow")
        device = devices.resolve_device("auto")
        exact_arithmetic()
        devices.keep_freed_memory()
        mean = np.zeros(data.array.shape[1]) if settings.raw else data.mean()
        sizes = f"{counted(len(data), word)} for {counted(len(queries), word)}"
        out.print(f"searching {sizes} on {device.type}", style="dim")
        to = (
            sys.stdout.buffer
            if output is None
            else stack.enter_context(store.new_file(Path(output), settings.overwrite))
        )
        on_terminal = output is None and sys.stdout.isatty()
        total = len(data) * -(-len(queries) // queries.size)
        tracker = stack.enter_context(report.Tracker(report.console(on_terminal or out.quiet), total, "rows"))
        lines = stack.enter_context(tables.written_to(to))
        lines.writerow(COLUMNS)
        for rows, values in queries.blocks():
            own = rows if queries.file is file else np.full(len(rows), -1)
            directed = directions(values.astype(np.float64), mean)
            hits, cosines = nearest(data, directed, own, k, mean, device, tracker.advance)
            _write(lines, file, queries.file, rows, hits, cosines)
    if output is None:
        to.flush()
    else:
        out.print(f"{output}: {counted(len(queries), 'query', 'queries')}")
    return lacking


def directions(values: Any, mean: Any) -> Any:
    """Rows minus the mean, of length 1: float64 [m, D] of NumPy or PyTorch. A row that is the mean becomes zero."""
    centred = values - mean
    norm = (centred * centred).sum(1, keepdims=True) ** 0.5
    some = norm > 1e-9 * (mean * mean).sum() ** 0.5
    return centred * (some / (norm + ~some))


def nearest(
    data: Pooled, queries: NDArray[np.float64], own: NDArray[np.int64], k: int, mean: NDArray[np.float64],
    device: torch.device, advance: Any = lambda rows: None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """The k rows of largest cosine with each query, in falling order, equal ones by row number.

    queries: float64 [m, D], see `directions`; own: int64 [m], a row that is no hit of its query.
    Returns row numbers int64 [m, k], -1 where there are fewer, and cosines float64 [m, k].
    """
    slack = (queries.shape[1] + 16) * 2.0**-23  # more than an fp32 product of two such directions can be off
    single, mean_there = torch.from_numpy(queries).float().to(device), torch.from_numpy(mean).to(device)
    room = torch.empty(TILE, data.size, device=device)
    best, kth = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)  # by their products
    found: list[tuple[NDArray[Any], ...]] = []
    for numbers, values in data.blocks():
        there = _single(torch.from_numpy(values).to(device), mean_there).T
        floor = torch.from_numpy(kth[:, -1]).to(device).float() - 2 * slack
        pairs = []
        for tile in store.blocks(len(queries), TILE):
            product = torch.mm(single[tile], there, out=room[: tile.stop - tile.start, : len(numbers)])
            pairs.append(_likely(product, floor[tile], k + 1, 2 * slack, tile.start))
        q, p, products = (torch.cat(each).cpu().numpy() for each in zip(*pairs, strict=True))
        foreign = numbers[p] != own[q]
        q, p, products = q[foreign], numbers[p[foreign]], products[foreign].astype(np.float64)
        touched, among = np.unique(q, return_inverse=True)
        of_touched = best[touched], kth[touched]
        _keep_best(*of_touched, among, p, products)
        best[touched], kth[touched] = of_touched
        found.append((q, p, products))
        if sum(len(each) for each, _, _ in found) > MOST_LIKELY or numbers[-1] == data.rows[-1]:
            q, p, products = (np.concatenate(each) for each in zip(*found, strict=True))
            still = np.flatnonzero(products >= kth[q, -1] - 2 * slack)
            found = [(q[still], p[still], products[still])]
        advance(len(numbers))
    return _exactly_best(data, queries, mean, k, *found[0][:2])


def _exactly_best(
    data: Pooled, queries: NDArray[np.float64], mean: NDArray[np.float64], k: int, q: NDArray[np.int64],
    p: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """The k best of likely pairs of a query and a row (int64 [n] each), by cosines in fp64; see `nearest`."""
    rows, cosines = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
    order = np.argsort(p, kind="stable")  # as they lie in the file
    q, p, exact = q[order], p[order], np.empty(len(q))
    for part in store.blocks(len(q), PAIRS):
        distinct, which = np.unique(p[part], return_inverse=True)
        there = directions(data.array[distinct].astype(np.float64), mean)
        exact[part] = np.einsum("ij,ij->i", queries[q[part]], there[which])
    _keep_best(rows, cosines, q, p, exact)
    return rows, cosines


def _single(values: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Directions in fp32 of rows [m, D] in the dtype of the file; mean: float64 [D]."""
    centred = values.double().sub_(mean)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    some = norm > 1e-9 * torch.linalg.vector_norm(mean)
    return centred.mul_(some / (norm + ~some)).float()


def _likely(
    product: torch.Tensor, floor: torch.Tensor, enough: int, slack: float, first: int
) -> tuple[torch.Tensor, ...]:
    """Query (int64 [n], counted from `first`), place (int64 [n]) and product of all that could be among the best.

    product: float32 [m, B]; floor: float32 [m], the least that could be; enough: hits of a query, and one more for its
    own row; slack: how far below a hit another product may be.
    """
    some = (product.amax(1) >= floor).nonzero()[:, 0]
    if len(some) < len(product):
        product, floor = product[some], floor[some]
    likely = product >= floor[:, None]
    if likely.count_nonzero() > MANY * enough * len(some):
        own = product.topk(min(enough, product.shape[1]), dim=1, sorted=False).values.amin(dim=1)
        likely = product >= torch.maximum(floor, own - slack)[:, None]
    query, place = likely.nonzero(as_tuple=True)
    return some[query] + first, place, product[query, place]


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


def _queries(data: Pooled, settings: SearchConfig, stack: ExitStack, out: Console) -> Pooled:
    """The rows that --query stands for: a file of that name comes before a protein of that name."""
    query, database = settings.query, settings.file
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
        return dataclasses.replace(data, rows=rows)
    if query == "-" or not _is_hdf5(query):
        return _embedded(data, settings, stack, out)
    return data if os.path.samefile(query, database) else _of_file(data, settings, stack, out)


def _is_hdf5(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(store.HDF5_MAGIC)) == store.HDF5_MAGIC
    except OSError as error:
        remedy = "Give a FASTA file, a file of embed, or a protein's name."
        raise UserError(f"The query {unread(path, error)}.", remedy) from None


def _of_file(data: Pooled, settings: SearchConfig, stack: ExitStack, out: Console) -> Pooled:
    query, database, kind, layer = settings.query, settings.file, data.kind, data.layer
    other = stack.enter_context(store.opened(query))
    ours, theirs = data.file.settings, other.settings
    if _is_other_model(ours, theirs):
        raise UserError(f"{query} was made with other weights than {database}.", "Embed it with the same --model.")
    if kind not in theirs["pool"] or layer not in theirs["layers"]:
        raise UserError(
            f"{query} has no {kind}/{layer}, which {database} is searched by.",
            f"Embed it with --pool {kind} --layers {layer}.",
        )
    for name in SAME:
        if ours.get(name) != theirs.get(name):
            out.print(f"{name} is {ours.get(name)} in {database}, {theirs.get(name)} in {query}", style="yellow")
    return default_rows.of(other, kind, layer)


def _embedded(data: Pooled, asked: SearchConfig, stack: ExitStack, out: Console) -> Pooled:
    """A FASTA, embedded as the database was, in a file that is removed in the end."""
    settings, query = data.file.settings, asked.query
    weights = audit.weights_of(data.file, asked.file, asked.model, asked.adapter, out)
    other_weights = f"{asked.file} was made with other weights than those of {weights.place}"
    if weights.sha256 != settings["weights_sha256"]:
        sha256 = settings["weights_sha256"][:16]
        raise UserError(f"{other_weights}.", f"Say where the weights of SHA-256 {sha256}... are: --model PATH.")
    is_same_device = settings["device"] == devices.resolve_device("auto").type
    config = resolve(EmbedConfig, None, {
        "inputs": query, "output": str(Path(stack.enter_context(scratch.folder())) / "queries.h5"), "quiet": True,
        "model": audit.model_of(data.file, asked.model), "adapter": audit.adapters_of(data.file, asked.adapter),
        "layers": data.layer, "pool": data.kind,
        "dtype": devices.short_name(getattr(torch, settings["dtype"])) if is_same_device else "auto",
        "store_dtype": settings["store_dtype"], "force_protein": asked.force_protein,
        **{name: settings[name] for name in (*SAME, "id", "dedup", "residual") if name in settings},
    })  # fmt: skip
    out.print(f"embedding {'standard input' if query == '-' else query} with {weights.place}", style="dim")
    try:
        with resumable(False):  # the folder goes
            embed.run(config)
    except UserError as error:
        if "--from contigs" not in error.remedy:
            raise
        remedy = "Queries are proteins: virnucpro embed --from contigs finds those of contigs. Or --force-protein."
        raise UserError(error.what, remedy) from None
    file = stack.enter_context(store.read_embeddings(config.output))
    if _is_other_model(settings, file.settings):
        raise UserError(f"{other_weights}: their heads differ.", "Put the config.json back that the weights had then.")
    return default_rows.of(file)


def _is_other_model(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the weights or, where both files say it, the number of attention heads differ."""
    heads = {settings["heads"] for settings in (ours, theirs) if "heads" in settings}
    return ours["weights_sha256"] != theirs["weights_sha256"] or len(heads) > 1


def _write(
    lines: Any, base: store.EmbeddingFile, other: store.EmbeddingFile, queries: NDArray[np.int64],
    hits: NDArray[np.int64], cosines: NDArray[np.float64],
) -> None:  # fmt: skip
    """A line for each hit. queries: rows of `other`, int64 [m]; hits: rows of `base`, int64 [m, k], -1 for none."""
    query, rank = np.nonzero(hits >= 0)
    hit = hits[query, rank]
    lines.writerows(zip(
        np.array(_names(other, queries), object)[query], _names(base, hit), (rank + 1).tolist(),
        (f"{cosine:.6f}" for cosine in cosines[query, rank].tolist()), other.lengths[queries[query]].tolist(),
        base.lengths[hit].tolist(), strict=True,
    ))  # fmt: skip


def _names(file: store.EmbeddingFile, rows: NDArray[np.int64]) -> list[str]:
    return [tables.cell(name) for name in file.names_at(rows)]
