"""Checks and the verdict that follows from them, as a rich table and as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


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

    def table(self) -> Table:
        table = Table(title="Validation", title_justify="left")
        table.add_column("")
        for name in ("median", "99 %", "worst"):
            table.add_column(name, justify="right")
        table.add_column("in", overflow="fold")
        for name in ("floor", "limit"):
            table.add_column(name, justify="right")
        table.add_column("")
        part = ""
        for check in self.checks:
            if check.part != part:
                part = check.part
                table.add_section()
                state = "FAIL" if part in self.failed_parts else "pass"
                table.add_row(part, *[""] * 6, state, style="bold")
            shown = {None: "", True: "ok", False: "FAIL"}[check.passed]
            numbers = [_number(value) for value in (check.median, check.p99, check.worst)]
            table.add_row(
                f"  {check.what}", *numbers, check.record[:28], check.floor, check.limit, check.note or shown
                if check.passed is not False else f"FAIL {check.note}",
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
