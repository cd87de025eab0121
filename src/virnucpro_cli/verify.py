"""The verify workflow: a finished file against its checksum and, record by record, against its FASTA. No model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.policies import decide
from virnucpro_cli.validation import audit
from virnucpro_cli.validation.verdict import Check, Verdict

FILE, INPUT = "File", "FASTA"


def run(path: str, inputs: tuple[str, ...] = (), report_path: str | None = None) -> Verdict:
    """Check the file; inputs: its FASTA, by default where the file says it was. Raises UserError if it is not one of ours."""
    report.check_places({"report": report_path}, [path, *inputs])
    out = report.console()
    verdict = Verdict("verify")
    with audit.opened(path) as file, _damage_named(path):
        settings = audit.settings_of(file, path)
        verdict.environment = {"file": path, "written by": f"virnucpro {file.attributes['tool_version']}"}
        verdict.checks += _of_the_file(file)
        unit = np.arange(len(file))
        named = inputs or tuple(entry["path"] for entry in json.loads(file.attributes["inputs"]))
        if not inputs and not all(Path(name).is_file() for name in named):
            verdict.notes.append(f"the FASTA is not at {', '.join(named)}: not compared; say where it is with --fasta")
        else:
            verdict.environment["inputs"] = list(named)
            checks, unit = _of_the_input(file, settings, named, Path(path).absolute().parent, unit)
            verdict.checks += checks
        out.print("reading every row", style="dim")
        verdict.checks += audit.stored(file, settings, unit)
    for note in verdict.notes:
        out.print(note, style="yellow")
    out.print(verdict.table())
    if report_path:
        report.save(report_path, verdict.to_json())
    return verdict


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """HDF5 finds some damage by itself, when it reads what the damage hit."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {in_a_line(error)}.", "Copy it again, or embed again.") from None


def _check(part: str, what: str, wrong: bool | np.bool_, note: str) -> Check:
    return Check(part, what, not wrong, note=note if wrong else "")


def _of_the_file(file: store.EmbeddingFile) -> list[Check]:
    pending = int((file.status == store.PENDING).sum())
    checks = [
        _check(FILE, "complete", not file.complete, "the run that writes it has not finished"),
        _check(FILE, "no record pending", pending > 0, f"{pending:,} are"),
    ]
    if file.complete:
        try:
            stored = str(file.report.get("checksum", ""))
        except ValueError:
            stored = "unreadable"
        differs = "its bytes are not those that embed wrote: copy it again, or embed again"
        if stored:
            checks.append(_check(FILE, "checksum of all bytes", stored != file.checksum(), differs))
        else:
            checks.append(Check(FILE, "checksum of all bytes", note="none: written by an older version"))
    return checks


def _of_the_input(
    file: store.EmbeddingFile, settings: dict[str, Any], inputs: tuple[str, ...], spool: Path, unit: Any
) -> tuple[list[Check], Any]:
    known = {f.name for f in fields(EmbedConfig)}
    said = {name: settings[name] for name in settings if name in known and name not in ("layers", "pool", "dtype")}
    config = EmbedConfig(
        inputs=inputs, output="none.h5", **{k: v for k, v in said.items() if k not in ("attention", "device")}
    )
    table = fasta.index(fasta.open_sources(inputs, spool), on_invalid=config.invalid, dedup=config.dedup)
    checks = [
        _check(INPUT, "content (SHA-256)", settings["input_sha256"] != table.sha256, "not what was embedded"),
        _check(INPUT, "records", len(table) != len(file), f"{len(table):,} in the FASTA, {len(file):,} in the file"),
    ]
    if len(table) != len(file):
        return checks, unit
    work = decide(table, config)
    given_up = (file.status == store.SKIPPED) & np.isin(file.reason, store.AFTER_TRYING)

    def rows(what: str, wrong: Any) -> Check:
        count, first = int(wrong.sum()), int(wrong.argmax())
        return _check(INPUT, what, count > 0, f"{count:,} differ, the first is record {first + 1:,}")

    names = np.zeros(len(table), np.bool_)
    for start in range(0, len(table), store.NAME_BLOCK):
        stop = min(start + store.NAME_BLOCK, len(table))
        there, here = file.names_of(start, stop), table.names(start, stop, config.id == "full")
        if there != here:
            names[start:stop] = [a != b for a, b in zip(there, here, strict=True)]
    status = np.where(work.status == store.PENDING, store.DONE, work.status)
    checks += [
        rows("ids", names),
        rows("lengths", file.lengths != table.length),
        rows("replaced residues", file.replaced != table.replaced),
        rows("statuses and reasons", ~given_up & ((file.status != status) | (file.reason != work.reason))),
        rows("flags", (file.flags & ~np.uint16(store.RECOMPUTED)) != work.flags),
    ]
    return checks, work.unit
