"""Wherever features cross, each record has the row of a plain run of that record alone: any input, any combination of options."""

import itertools
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from conftest import TINY, write_model
from test_faults import one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import store
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import placer, runner
from virnucpro_cli.errors import Stopped, UserError
from virnucpro_cli.exchange import export, importing
from virnucpro_cli.features import contigs as genes
from virnucpro_cli.kinds import EMITS, KINDS, OF_ALL_RESIDUES, POOLED, UNMASKED
from virnucpro_cli.model import weights

CUT, OVERLAP = 40, 10
"""--max-residues and --overlap of all runs."""
LAYERS = (0, 1, 2)
EXAMPLES = 60
"""As many as take a minute on a core."""
OWN_FLAGS = store.TRUNCATED | store.REPLACED | store.RECOMPUTED | store.WINDOWED
NOTHING_LEFT = "leaves nothing to embed|holds no residues"
REFUSED = "is not a residue|longer than|alignment gap"
"""What a run says of a record that --invalid error or --long error refuses."""


def _families() -> tuple[tuple[str, ...], ...]:
    """Sequences of all sorts; those of a family are often the same tokens by different text."""
    dice = random.Random(5)
    short, middle, cut, long = ("".join(dice.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in (5, 30, CUT, 95))
    families = [("", "M", "*", "X", "?", "-" * 6, short[:2] + "--" + short[2:]), ("ACGTACGTNNACGTTGCAACG", long * 11)]
    for text in (short, middle, cut, cut + "A", long):
        at = len(text) // 2
        odd = (text[:at] + letter + text[at + 1 :] for letter in ("X", "?", "J", "*", "-", ".", "<mask>"))
        families.append((*odd, text, text + "??"))
    return tuple(families)


FAMILIES = _families()
SPECIMENS = tuple(itertools.chain.from_iterable(FAMILIES))


@dataclass(frozen=True)
class Record:
    """name: its header; text: a specimen; the rest is how it stands in the file, which must not matter."""

    name: str
    text: str
    lower: bool = False
    star: bool = False
    width: int = 60

    def __str__(self) -> str:
        text = self.text.lower() if self.lower else self.text
        text += "*" * (self.star and self.text[-1:].isalpha())
        width = self.width if "<" not in text else len(text)  # a line with the end of `<mask>` alone is a header
        lines = [text[i : i + width] for i in range(0, len(text), width)]
        return "".join(f"{line}\n" for line in (f">{self.name}", *lines))


@dataclass(frozen=True)
class Scenario:
    """An input, the options that decide what becomes of a record, and how the run went about it."""

    records: tuple[Record, ...]
    decides: tuple[tuple[str, Any], ...]
    chosen: tuple[tuple[str, Any], ...] = ()
    budgets: tuple[int, ...] = (1024, 1024, 1024, 1024)
    crlf: bool = False
    shards: int = 0
    stop_after: int | None = None
    merge_stops_after: int | None = None
    cache: str | None = None
    group: str | None = None
    contigs: bool = False
    workers: int = 1
    layout: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.decides) | dict(self.chosen)


@st.composite
def scenarios(draw: Callable[..., Any]) -> Scenario:
    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def some_of(values: tuple[Any, ...], least: int = 0) -> tuple[Any, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), unique=True, min_size=least, max_size=3)))

    dice = random.Random(draw(st.integers(0, 1 << 32)))  # hypothesis alone seldom draws many records
    family = dice.choice(FAMILIES)
    texts = dice.sample(family[:5], min(3, len(family))) + dice.sample(SPECIMENS, 8)
    every = [
        Record(f"g{dice.randrange(3)}_p{i if dice.random() < 0.9 else 0} of {i}", dice.choice(texts), dice.random() < 0.3,
               dice.random() < 0.3, dice.choice((60, 7)))
        for i in range(24)
    ]  # fmt: skip
    kept = draw(st.lists(st.booleans(), min_size=24, max_size=24))
    records = tuple(itertools.compress(every, kept)) or (every[0],)
    long = one_of("truncate", "truncate", "window", "window", "full", "full", "skip", "error")
    gaps = one_of("keep", "keep", "keep", "strip", "strip", "x", "error")
    decides = {"invalid": one_of("x", "skip", "skip", "skip", "error"), "gaps": gaps, "long": long}
    pool = some_of(tuple(kind for kind in KINDS if long != "window" or kind not in OF_ALL_RESIDUES), 1)
    emit = some_of(EMITS) if long != "window" else ()
    cache = one_of(None, "cold", "warm", "of another file") if not emit and "residue" not in pool else None
    group = one_of(None, "regex", "table") if "mean" in pool else None
    chosen: dict[str, Any] = {
        "pool": pool, "layers": some_of(LAYERS, 1), "emit": emit, "dedup": one_of(True, True, False), "id": one_of("first", "full"),
    }  # fmt: skip
    if "contacts" in emit and one_of(False, True):
        chosen["contacts_for"] = "names.txt"
    return Scenario(
        records, tuple(decides.items()), tuple(chosen.items()), tuple(one_of(1024, 1100, 4096) for _ in range(4)),
        one_of(False, True), shards=one_of(0, 1, 2, 2, 3, 4),
        stop_after=one_of(None, 0, 1, 2), merge_stops_after=one_of(None, 0, 1, 3), cache=cache, group=group, contigs=one_of(*[False] * 7, True),
        workers=2 if dice.random() < 0.002 else 1, layout=one_of(None, None, "parquet", "keyed-h5", "biotrainer"),
    )  # fmt: skip


# --- the plain run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A record as a plain run of it alone has it. refused: what that run says if it refuses the record."""

    refused: str = ""
    columns: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


class Runs:
    """Runs of one tiny model in a folder, and what is known of records alone."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.known: dict[tuple[str, tuple[tuple[str, Any], ...]], Alone] = {}
        self.begun = self.compared = 0

    def embed(self, fasta: Path, output: Path, **options: Any) -> None:
        given = {"model": str(self.model), "device": "cpu", "dtype": "fp32", "store_dtype": "fp32", "max_residues": CUT,
                 "overlap": OVERLAP, "force_protein": True, "token_budget": 1024}  # fmt: skip
        embed_fasta(fasta, output, **given | options)

    def alone(self, text: str, decides: tuple[tuple[str, Any], ...]) -> Alone:
        """What is known of a record; of a policy for gaps by a text that has none, with X for `x`."""
        gaps = dict(decides).get("gaps")
        if gaps in ("strip", "x"):
            text = re.sub(r"(?<![.-])\.$", "", text)
            text = re.sub("[-.]", "" if gaps == "strip" else "X", text)
            decides = tuple({**dict(decides), "gaps": "keep"}.items())
        key = text, decides
        if key not in self.known:
            self.known[key] = self._alone(text, dict(decides))
        return self.known[key]

    def _alone(self, text: str, decides: dict[str, Any]) -> Alone:
        fasta, output = self.folder / "alone.fasta", self.folder / "alone.h5"
        window = decides["long"] == "window"
        pool = tuple(kind for kind in KINDS if not window or kind not in OF_ALL_RESIDUES)
        options = {"pool": pool, "layers": LAYERS, "emit": () if window else EMITS, "dedup": False, "overwrite": True}
        fasta.write_text(f">alone\n{text}\n")
        try:
            self.embed(fasta, output, **options, **decides)
        except UserError as error:
            if re.search(REFUSED, error.what):
                return Alone(refused=error.what)
            assert re.search(NOTHING_LEFT, error.what), error
            fasta.write_text(f">alone\n{text}\n>company\nMKV\n")  # a run of nothing but skipped records is refused
            self.embed(fasta, output, **options, **decides)
        with store.read_embeddings(output) as file:
            return Alone("", columns_of(file, 0), values_of(file, 0))


def columns_of(file: store.EmbeddingFile, row: int) -> dict[str, int]:
    columns = {name: int(getattr(file, name)[row]) for name in ("lengths", "status", "reason", "replaced")}
    return columns | {"flags": int(file.flags[row]) & OWN_FLAGS}


def values_of(file: store.EmbeddingFile, row: int) -> dict[str, NDArray[Any]]:
    """Everything that the file has of a record, by name."""
    found = {}
    for layer in file.layers:
        for kind in file.settings["pool"]:
            rows = file.residues(row, layer) if kind == "residue" else file.dataset(kind, layer)[row]
            found[f"{kind}/{layer}"] = rows
    for name in UNMASKED.values():
        if f"unmasked/{name}" in file._file:
            found[name] = file.logits(row) if name == "logits" else file.dataset("unmasked", name)[row]
    if file.contact_maps is not None and file.contact_maps.starts[row] >= 0:
        assert file.contact_maps.status[row] != store.PENDING
        found["contacts"] = file.contacts(row)
    return found


# --- the run of many ------------------------------------------------------------------------------------------------


@contextmanager
def stopped_after(packs: int | None) -> Iterator[None]:
    """A stop by a signal when that many packs were computed; None: no stop."""
    with pytest.MonkeyPatch.context() as patch:
        if packs is not None:
            real, left = runner.compute_with, [packs]

            def stopping(*of: Any) -> Any:
                compute = real(*of)

                def one(batch: Any) -> Any:
                    if left[0] == 0:
                        raise Stopped(signal.SIGTERM)
                    left[0] -= 1
                    return compute(batch)

                return one

            patch.setattr(runner, "compute_with", stopping)
            patch.setattr(placer, "COMMIT_SECONDS", 0.0)
        yield


@contextmanager
def merge_stopped_after(blocks: int | None) -> Iterator[None]:
    """A stop of `merge` by a signal when that many small blocks, and one more, were copied; None: no stop."""
    with pytest.MonkeyPatch.context() as patch:
        if blocks is not None:
            real = merge._copied

            def stopping(*of: Any) -> Iterator[int]:
                for number, rows in enumerate(real(*of)):
                    if number == blocks:
                        raise Stopped(signal.SIGTERM)
                    yield rows

            patch.setattr(merge, "_copied", stopping)
            patch.setattr(merge, "BLOCK_BYTES", 512)
        yield


def embedded(runs: Runs, scenario: Scenario, folder: Path) -> tuple[Path, Path]:
    """Do what the scenario says. Returns the FASTA of proteins and the file of all of them. Raises UserError."""
    fasta, output = folder / "in.fasta", folder / "out.h5"
    options = scenario.options
    if scenario.contigs:
        options |= {"from_": "contigs", "genes": "six-frame", "min_aa": 4}
        fasta.write_text("".join(f">c{i}\n{as_dna(record.text)}\n" for i, record in enumerate(scenario.records)))
    else:
        text = "".join(map(str, scenario.records))
        fasta.write_bytes((text.replace("\n", "\r\n") if scenario.crlf else text).encode())
    if "contacts_for" in options:
        options["contacts_for"] = str(folder / "names.txt")
        (folder / "names.txt").write_text("".join(f"{name}\n" for name in named_for_contacts(scenario)))
    if scenario.group == "regex":
        options["group_regex"] = "^(g[01])_" if not scenario.contigs else "^(c[0-9])_F"
    elif scenario.group == "table":
        options["group_table"] = str(folder / "groups.tsv")
        names = [record.name if options["id"] == "full" else record.name.split()[0] for record in scenario.records]
        table = {name: group for name in names if (group := group_by_table(name))}
        (folder / "groups.tsv").write_text("".join(f"{name}\t{group}\n" for name, group in table.items()) or "x\ty\n")
    if scenario.cache is not None:
        options["cache"] = str(folder / "cache")
        if scenario.cache != "cold":
            before = folder / "before.fasta"
            kept = scenario.records[::-1] if scenario.cache == "warm" else scenario.records[::2]
            before.write_text("".join(f">before_{i}\n{record.text}\n" for i, record in enumerate(kept)) + ">b\nMKVL\n")
            plain = {
                key: value for key, value in options.items() if not key.startswith(("group", "from", "genes", "min"))
            }
            runs.embed(before, folder / "before.h5", **plain)
    parts = [None] if not scenario.shards else [f"{k}/{scenario.shards}" for k in range(scenario.shards, 0, -1)]
    for number, shard in enumerate(parts):
        more = options | ({"shard": shard} if shard else {}) | {"workers": scenario.workers}
        try:
            with stopped_after(scenario.stop_after if number == len(parts) // 2 else None):
                runs.embed(fasta, output, **more, token_budget=scenario.budgets[number])
        except Stopped:
            runs.embed(fasta, output, **more, token_budget=scenario.budgets[-1])
    if scenario.shards:
        try:
            with merge_stopped_after(scenario.merge_stops_after):
                merge.merge_shards(str(output))
        except Stopped:
            merge.merge_shards(str(output))
    return (genes.paths_of(output).proteins if scenario.contigs else fasta), output


CODON = {
    "A": "GCT", "C": "TGC", "D": "GAC", "E": "GAA", "F": "TTC", "G": "GGC", "H": "CAC", "I": "ATC", "K": "AAA", "L": "CTG",
    "M": "ATG", "N": "AAC", "P": "CCG", "Q": "CAG", "R": "CGT", "S": "TCT", "T": "ACC", "V": "GTG", "W": "TGG", "Y": "TAC",
}  # fmt: skip


def as_dna(protein: str) -> str:
    return "".join(CODON.get(letter, "NNN") for letter in protein) or "ACG"


def group_by_table(name: str) -> str | None:
    return {"0": "even", "1": None, "2": "other"}[name[1]] if name.startswith("g") else None


def named_for_contacts(scenario: Scenario) -> set[str]:
    full = scenario.options["id"] == "full"
    return {record.name if full else record.name.split()[0] for record in scenario.records[::2]} - (
        {"c"} if scenario.contigs else set()
    )


# --- the comparison -------------------------------------------------------------------------------------------------


def check(runs: Runs, scenario: Scenario) -> None:
    runs.begun += 1
    folder = runs.folder / "crossing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records: list[tuple[str, str]] = [(record.name, record.text) for record in scenario.records]
    expected = [] if scenario.contigs else [runs.alone(text, scenario.decides) for _, text in records]
    try:
        fasta, output = embedded(runs, scenario, folder)
    except UserError as error:
        if scenario.contigs or re.search("no protein|in no group|No protein", error.what):
            return
        if re.search(NOTHING_LEFT, error.what):
            assert all(each.columns.get("status") == store.SKIPPED for each in expected if not each.refused)
        else:
            assert re.search(REFUSED, error.what) and any(each.refused for each in expected), error
        return
    if scenario.contigs:
        proteins = [text.partition("\n") for text in f"\n{fasta.read_text()}".split("\n>")[1:]]
        records = [(header, residues.replace("\n", "")) for header, _, residues in proteins]
        expected = [runs.alone(text, scenario.decides) for _, text in records]
    assert not any(each.refused for each in expected), "a run passed over a record that it has to refuse"
    full = scenario.options["id"] == "full"
    with store.read_embeddings(output) as file:
        assert file.complete and len(file) == len(records)
        numbers = range(len(records)) if file.records is None else file.records.tolist()
        assert sorted(numbers) == list(range(len(records)))
        for row, number in enumerate(numbers):
            name, alone = records[number][0], expected[number]
            assert file.names[row] == (name if full else name.split()[0])
            assert columns_of(file, row) == alone.columns, f"record {number}"
            found = values_of(file, row)
            assert len(found) >= len(scenario.options["pool"]) * len(scenario.options["layers"])
            for what, values in found.items():
                compare(values, alone.values[what], f"record {number}, {what}")
        if scenario.group is not None:
            check_groups(file, [file.names[row] for row in range(len(file))], scenario)
    runs.compared += 1
    if scenario.layout is not None:
        check_exchanged(scenario, fasta, output, folder)


def compare(found: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    assert found.shape == expected.shape, what
    assert np.array_equal(np.isnan(found), np.isnan(expected)), what
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=what)


def check_groups(file: store.EmbeddingFile, names: list[str], scenario: Scenario) -> None:
    """The rows of groups are made of the rows of their members."""
    groups = file.groups
    assert groups is not None
    for number, group in enumerate(groups.ids):
        if scenario.group == "regex":
            pattern = "^(g[01])_" if not scenario.contigs else "^(c[0-9])_F"
            member = np.array([bool((match := re.search(pattern, name)) and match[1] == group) for name in names])
        else:
            member = np.array([group_by_table(name) == group for name in names])
        assert np.array_equal(groups.of == number, member)
        rows = np.flatnonzero(member & (file.status == store.DONE))
        assert groups.members[number] == len(rows)
        for layer in file.layers:
            means = file.dataset("mean", layer)[:][rows].astype(np.float64)
            weights = file.lengths[rows].astype(np.float64)
            whole = (
                {"mean": means.mean(0), "length_weighted_mean": np.average(means, 0, weights), "max": means.max(0)}
                if len(rows)
                else {}
            )
            for kind in ("mean", "length_weighted_mean", "max"):
                found = groups.rows(kind, layer)[number]
                compare(found, whole.get(kind, np.full(len(found), np.nan)), f"group {group}, {kind}/{layer}")


def check_exchanged(scenario: Scenario, fasta: Path, output: Path, folder: Path) -> None:
    """A row that is exported and imported again is the record's, or missing with a reason."""
    assert scenario.layout is not None
    with store.read_embeddings(output) as file:
        kinds = [kind for kind in POOLED if kind in scenario.options["pool"]]
        if not kinds or not (file.status == store.DONE).any():
            return
        kind, layer = kinds[0], file.layers[-1]
        rows, done, names = file.dataset(kind, layer)[:], file.status == store.DONE, file.names
    target, back = folder / "exported.h5", folder / "back.h5"
    if scenario.layout == "parquet":
        target = folder / "exported.parquet"
    export.export_file(str(output), scenario.layout, str(target), (kind,), (layer,), (str(fasta),))
    importing.import_file(str(target), str(back), scenario.layout, (str(fasta),))
    with store.read_embeddings(back) as file:
        assert len(file) == len(rows)
        found = file.dataset(kind, layer)[:]
        for row in range(len(rows)):
            if file.status[row] == store.DONE:
                assert done[row], f"record {row} was skipped and has a row now"
                compare(found[row], rows[row], f"record {row}, imported")
            else:
                assert np.isnan(found[row]).all() and file.reason[row]
                unique = names.count(names[row]) == 1
                assert not (done[row] and unique), f"record {row} is lost: {store.REASONS[file.reason[row]]}"


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("crossings")
    model = write_model(folder / "tiny") / "model.safetensors"
    heads = weights.random_heads(TINY)
    heads["lm_head.layer_norm.weight"] += 1
    save_file(load_file(model) | heads, model)
    return Runs(folder, model.parent)


WORKERS = Scenario(
    tuple(Record(f"g0_p{i} of {i}", text) for i, text in enumerate(SPECIMENS)),
    (("invalid", "x"), ("long", "window")),
    (("pool", ("mean", "residue")), ("layers", LAYERS), ("emit", ()), ("dedup", True), ("id", "first")),
    workers=2,
)
SKIPPED_TWIN = Scenario(
    tuple(Record(f"g0_p{i} of {i}", text) for i, text in enumerate(("MKVLA?MKVLA", "AAW", "C" * 20, "MKVLAXMKVLA"))),
    (("invalid", "skip"), ("long", "truncate")),
    (("pool", ("mean",)), ("layers", (2,)), ("emit", ()), ("dedup", True), ("id", "first")), shards=2,
)  # fmt: skip
EMPTY_SHARD = Scenario(
    (Record("g0_p0 of 0", "M"),), (("invalid", "x"), ("long", "truncate")),
    (("pool", ("mean", "residue")), ("layers", LAYERS), ("emit", EMITS), ("dedup", True), ("id", "first")), shards=2,
)  # fmt: skip

ALL_TOKENS = Scenario(
    (Record("g0_p0 of 0", "QFWQYVGIEDCHPAQHHTLH.RCYARTASINAAEYESWWH", lower=True, star=True, width=7),),
    (("invalid", "x"), ("gaps", "keep"), ("long", "truncate")),
    (("pool", ("mean-all",)), ("layers", (0,)), ("emit", ()), ("dedup", True), ("id", "first")),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@example(SKIPPED_TWIN)
@example(WORKERS)
@example(EMPTY_SHARD)
@example(ALL_TOKENS)
@given(scenarios())
def test_each_record_has_the_row_of_a_plain_run_of_it_alone(runs: Runs, scenario: Scenario) -> None:
    check(runs, scenario)


@pytest.mark.soak
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
@given(scenarios())
def test_each_record_has_the_row_of_a_plain_run_of_it_alone_ten_thousand_times(runs: Runs, scenario: Scenario) -> None:
    check(runs, scenario)
