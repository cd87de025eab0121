"""Checks and the verdict that follows from them, as a rich table and as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from virnucpro_cli import report

_Row = tuple[str, dict[str, str], str]
"""Name, numbers by column, and state of a check; a part of the verdict has no numbers."""


@dataclass(frozen=True)
class Check:
    """One line of a verdict. passed is None where nothing is judged; record names where `worst` was seen."""

    part: str
    what: str
    passed: bool | None = None
    median: float | None = None
    p99: float | None = None
    worst: float | None = None
    record: str = ""
    floor: str = ""
    limit: str = ""
    note: str = ""

    @classmethod
    def of(
        cls,
        part: str,
        what: str,
        values: NDArray[np.float64],
        names: Sequence[str] | NDArray[np.object_],
        lowest: bool = False,
        **rest: Any,
    ) -> "Check":
        """A check that shows values, float64 [m], of m named records; lowest: whether the lowest is the worst."""
        order = np.argsort(-values if lowest else values)
        p99 = float(values[order[round(0.99 * (len(order) - 1))]])
        worst = int(order[-1])
        median = float(np.median(values))
        return cls(part, what, median=median, p99=p99, worst=float(values[worst]), record=names[worst], **rest)


@dataclass
class Verdict:
    """The findings of a validation.

    records: per protein numbers by metric; environment: what was compared on what; largest: value of the residual
    stream in each layer.
    """

    command: str
    checks: list[Check] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def failed_parts(self) -> list[str]:
        return list(dict.fromkeys(check.part for check in self.checks if check.passed is False))

    def to_json(self) -> str:
        """Numbers that JSON does not have are words, such as "nan"."""
        whole = {"passed": self.passed, "failed_parts": self.failed_parts, **dataclasses.asdict(self)}
        return json.dumps(json.loads(json.dumps(whole), parse_constant=lambda word: str(float(word))), indent=1)

    def show(self, out: Console, path: str | None) -> None:
        """Print the table and the notes, and write the JSON to a path, if any. Raises UserError if that fails."""
        out.print(self.table())
        for note in self.notes:
            out.print(note, style="yellow")
        if path:
            report.save(path, self.to_json())

    def table(self) -> report.Fitting:
        """Columns that hold nothing are left out. Where they do not fit, a check's numbers share a cell."""
        rows = list(self._rows())
        return report.Fitting(self._wide(rows), lambda fits: [self._narrow(rows)])

    def _rows(self) -> Iterator[_Row]:
        for part in dict.fromkeys(check.part for check in self.checks):
            checks = [check for check in self.checks if check.part == part]
            is_judged = any(check.passed is not None for check in checks)
            yield part, {}, "FAIL" if part in self.failed_parts else "pass" if is_judged else ""
            for check in checks:
                numbers = {"median": check.median, "99 %": check.p99, "worst": check.worst}
                words = {"in": check.record, "floor": check.floor, "limit": check.limit}
                state = f"FAIL {check.note}" if check.passed is False else check.note or ("ok" if check.passed else "")
                yield f"  {check.what}", {name: _number(n) for name, n in numbers.items()} | words, state.rstrip()

    def _narrow(self, rows: list[_Row]) -> Table:
        table = report.facts_table(self.command.capitalize())
        for what, numbers, state in rows:
            words = [*(f"{name} {word}" for name, word in numbers.items() if word), state]
            _add(table, what, numbers, ", ".join(filter(None, words)))
        return table

    def _wide(self, rows: list[_Row]) -> Table:
        names = next((list(numbers) for _, numbers, _ in rows if numbers), [])
        shown = [name for name in names if any(numbers.get(name) for _, numbers, _ in rows)]
        table = report.columns_table(self.command.capitalize(), ("", *shown, ""), ("", "in"))
        table.show_header = any(check.median is not None or check.limit for check in self.checks)
        for what, numbers, state in rows:
            _add(table, what, numbers, *(numbers.get(name, "") for name in shown), state)
        return table


def _add(table: Table, what: str, numbers: dict[str, str], *cells: str) -> None:
    """A line; one of a part stands out."""
    if not numbers:
        table.add_section()
    table.add_row(what, *cells, style=None if numbers else "bold")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.7f}" if 0.5 < abs(value) <= 1 else f"{value:.2g}" if abs(value) > 1 else f"{value:.1e}"
