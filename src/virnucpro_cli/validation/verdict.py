"""Checks and the verdict that follows from them, as a rich table and as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from virnucpro_cli.report import Fitting, facts_table


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


@dataclass
class Verdict:
    """What a validation found. records: per protein numbers by metric; environment: what was compared on what."""

    command: str
    checks: list[Check] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
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
        whole = {"passed": self.passed, "failed_parts": self.failed_parts, **dataclasses.asdict(self)}
        return json.dumps(_plain(whole), indent=1)

    def table(self) -> Fitting:
        """Columns that hold nothing are left out. Where they do not fit, a check's numbers share a cell."""
        return Fitting(self._wide(), lambda fits: [self._narrow()])

    def _narrow(self) -> Table:
        table = facts_table(self.command.capitalize())
        part = ""
        for check in self.checks:
            if check.part != part:
                part = check.part
                table.add_section()
                table.add_row(part, "FAIL" if part in self.failed_parts else "pass", style="bold")
            numbers = (
                ("median", _number(check.median)), ("99 %", _number(check.p99)), ("worst", _number(check.worst)),
                ("in", check.record), ("floor", check.floor), ("limit", check.limit),
            )  # fmt: skip
            state = {None: check.note, True: check.note or "ok", False: f"FAIL {check.note}".rstrip()}[check.passed]
            words = [*(f"{name} {word}" for name, word in numbers if word), state]
            table.add_row(f"  {check.what}", ", ".join(filter(None, words)))
        return table

    def _wide(self) -> Table:
        table = Table(title=self.command.capitalize(), title_justify="left")
        table.show_header = any(check.median is not None or check.limit for check in self.checks)
        columns = {
            "median": [_number(check.median) for check in self.checks],
            "99 %": [_number(check.p99) for check in self.checks],
            "worst": [_number(check.worst) for check in self.checks],
            "in": [check.record for check in self.checks],
            "floor": [check.floor for check in self.checks],
            "limit": [check.limit for check in self.checks],
        }
        columns = {name: words for name, words in columns.items() if any(words)}
        table.add_column("", overflow="fold")
        for name in columns:
            table.add_column(name, justify="left" if name == "in" else "right", overflow="fold")
        table.add_column("", overflow="fold")
        part = ""
        for i, check in enumerate(self.checks):
            if check.part != part:
                part = check.part
                table.add_section()
                state = "FAIL" if part in self.failed_parts else "pass"
                table.add_row(part, *[""] * len(columns), state, style="bold")
            shown = check.note or {None: "", True: "ok"}.get(check.passed, "")
            table.add_row(
                f"  {check.what}", *(words[i] for words in columns.values()),
                f"FAIL {check.note}".rstrip() if check.passed is False else shown,
            )  # fmt: skip
        return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.7f}" if 0.5 < abs(value) <= 1 else f"{value:.2g}" if abs(value) > 1 else f"{value:.1e}"


def _plain(value: Any) -> Any:
    """The same with numbers that JSON does not have as words."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
