"""Numbers of a run and how people see them: a report as rich tables and JSON, stage clocks, and progress."""

import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from virnucpro_cli.errors import UserError, printable, shell_word, shortened
from virnucpro_cli.stopping import wrote

LOG_EVERY_SECONDS = 30.0
LENGTHS = (0, 50, 100, 200, 400, 800, 1023, 2000, 5000)
"""Where the ranges of a histogram of lengths begin."""
RANGES = 8
"""Ranges of rows that a report names, at most."""


@dataclass
class RunReport:
    """The account of a run, in sections of plain numbers and words.

    seconds: by stage, which add up to the wall time but for those named in meanwhile: these are inside of stages, or
    beside them on other threads. rates: per second of the forward stage. tables: title -> rows of columns. missed:
    things asked for that are not in the file.
    """

    command: str
    counts: dict[str, int] = field(default_factory=dict)
    packing: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    meanwhile: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    already_complete: bool = False
    missed: int = 0
    checksum: str = ""  # of the file, see store.checksum
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps(dataclasses.asdict(self), indent=indent)

    def to_json_within(self, size: int) -> str:
        """The report, or if it is larger than `size` bytes, the report with tables and notes cut short."""
        whole = self.to_json()
        if len(whole.encode()) <= size:
            return whole
        notes = [note[:200] for note in self.notes[:20]] + [
            "this report is cut short; --report FILE.json has all of it"
        ]
        tables = {title: rows[:8] for title, rows in self.tables.items()}
        return dataclasses.replace(self, notes=notes, tables=tables).to_json(indent=None)


REPORTS = ("report", "qc", "plot", "config", "multiqc")
"""Options whose files are replaced by the next run, if they are reports of this program."""
BEGINNINGS = (b'{\n "command": "', b'{\n "passed": ', b'{\n "id": "virnucpro_', b"name\tstatus\treason\tlength\t",
              b"# virnucpro embed --config ")  # fmt: skip
PICTURES = (b"\x89PNG", b"%PDF", b"<?xml")


def check_places(written: dict[str, str | None], read: Iterable[str | Path], overwrite: bool | None = None) -> None:
    """Raise UserError unless every file to be written has a place, and none is one that is read or written otherwise.

    written: option's name -> path, None, or `-` for standard output; read: files, and folders of which all files are
    read; overwrite: whether reports may replace files that are no reports, None where a command has no such option.
    """
    wanted = {option: Path(path) for option, path in written.items() if path and path != "-"}
    for option, path in wanted.items():
        this, folder, another = f"The {option} {path}", path.absolute().parent, "Choose another name."
        if path.is_dir() or not folder.is_dir() or not path.resolve().parent.is_dir():
            remedy = f"Name a file in a folder that exists{_folder_to_make(path)}."
            raise UserError(f"{this} cannot be written there.", remedy)
        if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{this} cannot be made in that folder: no permission.", "Choose another place.")
        if path.exists() and not ((path.is_file() or path.is_char_device()) and os.access(path, os.W_OK)):
            raise UserError(f"{this} is not a file that can be written.", another)
        for other in [*map(Path, read), *(p for name, p in wanted.items() if name != option)]:
            if _reaches(path, other):
                raise UserError(f"{this} would overwrite {other}, which this run reads or writes.", another)
        if option.partition(" ")[0] in REPORTS and not overwrite and path.is_file() and not _is_ours(path):
            remedy = another if overwrite is None else "Choose another name, or --overwrite it."
            raise UserError(f"{this} exists, and is no {option} of this program.", remedy)


def _folder_to_make(path: Path) -> str:
    """The command that makes a missing folder, if nothing is in its way."""
    folder, *above = path.absolute().parents
    missing = not folder.exists() and next(each for each in above if each.exists()).is_dir()
    return f": mkdir -p {shell_word(path.parent)}" if missing and not path.is_dir() else ""


def _reaches(path: Path, other: Path) -> bool:
    """Whether writing a path changes another file, or an existing one in another folder."""
    if path.resolve() == other.resolve():
        return True
    inside = other.is_dir() and path.resolve().is_relative_to(other.resolve())
    return path.exists() and other.exists() and (inside or path.samefile(other))


def _is_ours(path: Path) -> bool:
    """Whether a file is empty, or a report, a table, a picture or a configuration that this program wrote."""
    with open(path, "rb") as file:
        text = file.read(1 << 24)
    return not text or text.startswith(BEGINNINGS) or (text.startswith(PICTURES) and b"virnucpro" in text)


@contextmanager
def text_to(path: str) -> Iterator[IO[str]]:
    """A text file in UTF-8 for writing, or standard output for `-`. Raises UserError if it cannot be written."""
    try:
        if path == "-":
            sys.stdout.flush()
            text = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="", write_through=True)
            try:
                yield text
            finally:
                text.detach()
            sys.stdout.flush()
        else:
            with open(path, "w", encoding="utf-8", newline="") as file:
                wrote()
                yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from None


def save(path: str, text: str) -> None:
    """Write a report to a file, or to standard output for `-`. Raises UserError if that fails."""
    with text_to(path) as file:
        file.write(text + "\n")


class Clock:
    """Wall seconds by stage. A moment is of one stage at most, so that stages never count a second twice.

    A stage inside another takes its seconds from it. meanwhile: seconds of what goes on inside of stages, or beside
    them on other threads; these are in no sum.
    since: the moment (`time.perf_counter`) at which the program began; what came before the clock is the stage `start`.
    """

    def __init__(self, since: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.meanwhile: dict[str, float] = {}
        self.started = self._turned = time.perf_counter() if since is None else since
        self._stage: str | None = None if since is None else "start"
        self.turn(None)

    def so_far(self) -> float:
        """Wall seconds since the program began, or else since the clock was made."""
        return time.perf_counter() - self.started

    def turn(self, name: str | None) -> str | None:
        """Let the time from now on be of another stage, of none for None; returns the stage until now."""
        now, before = time.perf_counter(), self._stage
        if before is not None:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self._turned
        self._stage, self._turned = name, now
        return before

    @contextmanager
    def stage(self, name: str, half: str = "") -> Iterator[None]:
        """Let the time of the block be of a stage, or of a half's stage. For the thread that made the clock."""
        before = self.turn(stage_name(name, half))
        try:
            yield
        finally:
            self.turn(before)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Measure a block that takes no time from the stage around it. For any thread, each with a name of its own."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.meanwhile[name] = self.meanwhile.get(name, 0.0) + time.perf_counter() - started

    def spent(self) -> dict[str, float]:
        """Seconds by stage, with `rest` for those that are in none: they add up to the wall seconds so far."""
        self.turn(self._stage)
        return self.seconds | {"rest": self._turned - self.started - sum(self.seconds.values())}


PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}


class _Console(Console):
    """A console that shows no character which would steer a terminal, wherever the text is from."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            each if each.control else Segment(printable(each.text), each.style) for each in buffer
        )


class _Stderr(_Console):
    """A console whose reader may go away: a lost terminal or a closed pipe must not end a run of hours."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.quiet = True


def console(quiet: bool = False) -> Console:
    """stderr; stdout stays clean. Not a terminal: no colour, and so wide that no message is broken."""
    gone = sys.stderr is None
    width = None if not gone and sys.stderr.isatty() else 1000
    return _Stderr(stderr=True, quiet=quiet or gone, width=width, **PLAIN)


def stdout() -> Console:
    """For what a command was asked to show."""
    return _Console(**PLAIN)


class _Table(Table):
    """A table whose long words, say names of proteins, are shortened: it takes hours to wrap some."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(shortened(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def facts_table(title: str) -> Table:
    """Names to the left, and what is said of each to the right."""
    table = _Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    return table


def columns_table(title: str, names: Iterable[str], left: Collection[str] = ("",)) -> Table:
    """A table with columns of these names. Those to the left hold words, the others numbers."""
    table = _Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


class Part(NamedTuple):
    """Progress in other units than the tracker's. share: how much of the tracker's unit each is."""

    tracker: "Tracker"
    share: float

    def advance(self, units: int) -> None:
        self.tracker.advance(self.share * units)


def stage_name(name: str, half: str) -> str:
    """The name of a stage, or of the same stage of a half."""
    return f"{name}, {half}" if half else name


class Tracker:
    """Progress in tokens, or what else: a bar on a terminal, otherwise one line every 30 seconds."""

    def __init__(self, out: Console, total: int, what: str = "tokens"):
        self.out, self.total, self.what = out, total, what
        self.done = 0.0
        self.started = self.last_line = time.monotonic()
        on_terminal = out.is_terminal and not out.quiet
        self.bar = Progress(
            SpinnerColumn(), TextColumn("embedding" if what == "tokens" else what), BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=out, disable=not on_terminal or not total,
        )  # fmt: skip
        self.task = self.bar.add_task("embed", total=total, rate="")

    def __enter__(self) -> "Tracker":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.bar.disable:
            self.bar.stop()

    def part(self, share: float) -> "Part":
        """Progress in units of which each is so much of one here."""
        return Part(self, share)

    def advance(self, tokens: float) -> None:
        self.done += tokens
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        if not self.bar.disable:
            self.bar.update(self.task, completed=self.done, total=self.total, rate=f"{rate:,.0f} {self.what}/s")
        elif now - self.last_line >= LOG_EVERY_SECONDS:
            self.last_line = now
            share, left = self.done / max(self.total, 1), clock_time((self.total - self.done) / rate)
            self.out.print(f"{share:6.1%} of {self.total:,} {self.what}, {rate:,.0f} {self.what}/s, {left} left")


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def amount(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def by_length(lengths: NDArray[np.int32]) -> dict[str, int]:
    """How many records, of lengths int32 [N], there are in the ranges of LENGTHS, by the words for each range."""
    labels = [*(f"{a}-{b - 1}" for a, b in pairwise(LENGTHS)), f"{LENGTHS[-1]} and more"]
    counts = np.histogram(lengths, [*LENGTHS, np.iinfo(np.int32).max])[0].tolist()
    return dict(zip(labels, counts, strict=True))


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def where_computed(
    environments: list[str], computed_by: NDArray[np.uint8], done: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """A row for each environment that a file was computed in, with its ranges of records.

    computed_by: uint8 [N], number of each record's environment; done: bool [N], whether it was computed.
    """
    rows = []
    for number, environment in enumerate(environments):
        records = np.flatnonzero((computed_by == number) & done)
        runs = [run for run in np.split(records, np.flatnonzero(np.diff(records) != 1) + 1) if len(run)]
        ranges = [f"{run[0]:,}-{run[-1]:,}" for run in runs[:RANGES]]
        more = [f"and {len(runs) - RANGES:,} more"] if len(runs) > RANGES else []
        rows.append(json.loads(environment) | {"proteins": len(records), "rows": ", ".join(ranges + more)})
    return rows


@dataclass
class Fitting:
    """A table as it is where it fits the width of the console; else other tables, which say the same."""

    wide: Table
    narrow: Callable[[Callable[[Table], bool]], Iterable[Table]]  # of a test whether a table fits

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        def fits(table: Table) -> bool:
            return Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width

        return iter([self.wide] if fits(self.wide) else self.narrow(fits))


def rows_table(title: str, rows: list[dict[str, Any]]) -> Fitting:
    """One of `RunReport.tables`: words to the left, numbers to the right, shares as percentages.

    Where that is too wide, rows are columns, as many side by side as fit.
    """
    table = columns_table(title, rows[0], [name for name, value in rows[0].items() if isinstance(value, str)])
    for row in rows:
        table.add_row(*(cell(name, value) for name, value in row.items()))

    def turned(fits: Callable[[Table], bool]) -> Iterator[Table]:
        first = 0
        while first < len(rows):
            lasts = range(len(rows), first, -1)
            last = next(last for last in lasts if last == first + 1 or fits(_turned(title, rows[first:last])))
            yield _turned(title, rows[first:last])
            first = last

    return Fitting(table, turned)


def _turned(title: str, rows: list[dict[str, Any]]) -> Table:
    table = facts_table(title)
    for _ in rows[1:]:
        table.add_column(overflow="fold")
    for name in rows[0]:
        table.add_row(name, *(cell(name, row.get(name, "")) for row in rows))
    return table


SHARES = (
    "density", "padding waste", "spread", "hidden by overlap", "idle at the end", "of the floor", "of the bare forward",
    "MFU",
)  # fmt: skip


def cell(name: str, value: Any) -> str:
    """A value as people read it, by the name of its column."""
    if isinstance(value, str):
        return value
    if name.startswith(SHARES):
        return f"{value:.1%}"
    return f"{value:.2f} x" if name == "packed is faster by" else amount(value)


def packing_table(report: RunReport) -> Table:
    rows = {}
    for name, value in (report.counts | report.packing).items():
        if value or name in ("proteins", "packs"):
            is_share = name.startswith("density") or name.endswith("share")
            rows[name] = f"{value:.2%}" if is_share else amount(value)
    return _numbers_table("Packing", rows)


def throughput_table(report: RunReport) -> Table:
    shown = ("model", "device", "workers", "dtype", "attention", "token budget")
    return _numbers_table(
        "Throughput",
        {name: f"{value:.2f} s" for name, value in report.seconds.items() if name not in report.meanwhile},
        {f"meanwhile: {name}": f"{report.seconds[name]:.2f} s" for name in report.meanwhile},
        {name: amount(value) for name, value in report.rates.items()},
        {name: size(count) for name, count in report.memory.items()},
        {name: word for name, word in report.environment.items() if isinstance(word, str) and name in shown},
    )


def _numbers_table(title: str, *sections: dict[str, str]) -> Table:
    table = facts_table(title)
    table.columns[1].justify = "right"
    for section in sections:
        for row in section.items():
            table.add_row(*row)
        table.add_section()
    return table
