"""Groups of records: which record is in which, and a row for each group, from the means of its members in the file."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import fasta, store, tables
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.features import Feature, Run, Shards
from virnucpro_cli.plan.policies import Decisions
from virnucpro_cli.store import schema

KINDS = ("mean", "length_weighted_mean", "max")
BLOCK_BYTES = 1 << 25


class Groups(Feature):
    """A row for each group of proteins."""

    reads = ("group_table",)

    def __init__(self, config: EmbedConfig):
        """Raises UserError if the table of --group-table cannot be read, or is no table of two columns."""
        super().__init__(config)
        self.named: dict[str, str] = {}
        if config.group_table is not None:
            lines = tables.Lines(config.group_table)
            pairs = ((name, group) for name, group in tables.rows(lines, columns=2))
            self.named = tables.by_name(lines, pairs, "group")
            self.sha256 = lines.digest.hexdigest()

    def of_input(self, table: fasta.RecordTable, extra: store.Extra) -> store.Extra:
        """Columns and names of the groups, in the order of the contigs, or of their first record.

        Raises UserError if no record is in a group.
        """
        config, counts = self.config, dict[str, int]()
        if config.group == "contig":
            of, ids, fingerprint = extra.columns["genes/contig"], extra.tables["contigs/ids"], "contig"
        elif config.group_regex is not None:
            search, fingerprint = re.compile(config.group_regex).search, f"regex {config.group_regex}"
            of, ids = self._by_name(table, lambda name: match[1] if (match := search(name)) else None, set())
            self._check(of, f"--group-regex {config.group_regex!r} finds a group in the name of", table)
        else:
            fingerprint, unknown = f"table {self.sha256}", set(self.named)
            of, ids = self._by_name(table, self.named.get, unknown)
            self._check(of, f"{config.group_table} holds the name of", table)
            counts = {f"names of {config.group_table} that no protein has": len(unknown)}
        counts |= {"groups": len(ids), "proteins in no group": int((of < 0).sum())}
        columns, names = {"groups/of": of}, {"groups/ids": ids}
        return store.Extra(columns, names, fingerprint={"groups": fingerprint}, counts=counts)

    def _by_name(
        self, table: fasta.RecordTable, group_of: Callable[[str], str | None], unknown: set[str]
    ) -> tuple[NDArray[np.int64], Any]:
        """The number of each record's group, -1 for none, and the names of the groups; an empty name is none.

        Names of records leave `unknown`.
        """
        numbers: dict[str, int] = {}
        of = np.full(len(table), -1, np.int64)
        for block in store.blocks(len(table)):
            names = table.names(block.start, block.stop, self.config.id == "full")
            of[block] = [numbers.setdefault(group, len(numbers)) if group else -1 for group in map(group_of, names)]
            unknown.difference_update(names)
        ids = list(numbers)
        return of, store.Names(len(ids), lambda start, stop: ids[start:stop], sum(len(name.encode()) for name in ids))

    def _check(self, of: NDArray[np.int64], words: str, table: fasta.RecordTable) -> None:
        if not (of >= 0).any():
            examples = table.examples(self.config.id == "full")
            raise UserError(f"{words} no protein.", f"Names in the input are such as {examples}.")

    def of_part(self, records: NDArray[np.int64] | None, decisions: Decisions, extra: store.Extra) -> store.Extra:
        """Room for the rows of groups, and int64 [G] members; a shard has none, which merge makes."""
        return room(extra) if records is None else store.Extra()

    def finish(self, run: Run) -> None:
        fill(run.file)

    @staticmethod
    def of_merged(extra: store.Extra, shards: Shards) -> store.Extra:
        return room(extra)

    @staticmethod
    def merge(file: store.Store, shards: Shards) -> None:
        fill(file)


def room(extra: store.Extra) -> store.Extra:
    """Room for the rows of the groups, if there are groups."""
    ids = extra.tables.get("groups/ids")
    if ids is None:
        return store.Extra()
    members, rows = "groups/members", {f"groups/{kind}": len(ids) for kind in KINDS}
    return store.Extra(tables={members: np.zeros(len(ids), np.int64)}, rows=rows, changing=frozenset((members,)))


def fill(file: store.Store) -> None:
    """Place the rows of all groups, if the file has room for them. Every record must have been placed and marked.

    Members are added up in float64 in the order of their numbers, a block after the other, so that the bits depend on
    nothing but the rows in the file. length_weighted_mean weights a protein by its whole length, as in /lengths.
    A group without members is NaN.
    """
    if "groups/members" not in file.places:
        return
    file.commit()
    with store.read_embeddings(file.path) as there:
        assert there.groups is not None
        of, count, lengths = there.groups.of, len(there.groups), there.lengths.astype(np.float64)
    _, bounds = _members(file, of, count)
    file.place("groups", "members", np.arange(count), np.diff(bounds))
    for each in (file, *file.halves.values()):
        each.commit()
        _fill(each, of, lengths, *_members(each, of, count))


def _members(file: store.Store, of: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Records that are done and in a group, int64 [m], group by group, and where each group begins, int64 [G + 1].

    of: int64 [N], the group of each record.
    """
    members = np.flatnonzero((file.status == store.DONE) & (of >= 0))
    members = members[np.argsort(of[members], kind="stable")]
    return members, np.searchsorted(of[members], np.arange(count + 1))


def _fill(
    file: store.Store, of: NDArray[np.int64], lengths: NDArray[np.float64], members: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> None:  # fmt: skip
    count = len(bounds) - 1
    for layer in (name.rpartition("/")[2] for name in file.places if name.startswith("groups/mean/")):
        rows_of = next(name for kind in ("mean", "mean-all") if (name := f"{kind}/{layer}") in file.places)
        dtype = file.places[rows_of].dtype
        width = file.places[rows_of].row_bytes // dtype.itemsize
        at_once = max(1, BLOCK_BYTES // (8 * width))
        for first, last in schema.chunks(bounds, count, at_once):
            rows = members[bounds[first] : bounds[last]]
            blocks = (rows[block] for block in store.blocks(len(rows), at_once))
            values = ((of[block] - first, lengths[block], file.read(rows_of, block)) for block in blocks)
            for kind, pooled in zip(KINDS, _pooled(values, last - first, width), strict=True):
                file.place(f"groups/{kind}", layer, np.arange(first, last), pooled.astype(dtype))


Block = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[Any]]


def _pooled(blocks: Iterator[Block], groups: int, width: int) -> tuple[NDArray[np.float64], ...]:
    """The mean of each group, the mean weighted by length, and the maximum, float64 [groups, width].

    blocks: of members, sorted by group: group, length, values [n, width].
    """
    total, weighted = np.zeros((groups, width)), np.zeros((groups, width))
    most = np.full((groups, width), -np.inf)
    number, weight = np.zeros((groups, 1)), np.zeros((groups, 1))
    for group, length, rows in blocks:
        values = rows.astype(np.float64)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        which = group[starts]
        total[which] += np.add.reduceat(values, starts)
        weighted[which] += np.add.reduceat(values * length[:, None], starts)
        most[which] = np.maximum(most[which], np.maximum.reduceat(values, starts))
        number[which, 0] += np.diff(starts, append=len(group))
        weight[which, 0] += np.add.reduceat(length, starts)
    with np.errstate(invalid="ignore"):
        return total / number, weighted / weight, np.where(number > 0, most, np.nan)
