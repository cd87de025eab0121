"""The verify workflow: a finished file against its checksum and, record by record, against its FASTA. No model."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from virnucpro_cli import fasta, report, scratch, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.plan.policies import decide
from virnucpro_cli.validation import audit, plain_reader
from virnucpro_cli.validation.verdict import Check, Verdict

FILE, INPUT, ROWS = "File", "FASTA", "Rows"


def verify_file(path: str, inputs: tuple[str, ...] = (), report_path: str | None = None) -> Verdict:
    """Check the file; inputs: its FASTA, by default where the file says it was. Raises UserError if it is not one of ours."""
    out = report.console()
    verdict = Verdict("verify")
    with store.opened(path) as file:
        settings = file.settings
        named = inputs or tuple(entry["path"] for entry in file.inputs)
        report.check_places({"report": report_path}, [path, *named])
        verdict.environment = {"file": path, "written by": f"virnucpro {file.attributes['tool_version']}"}
        verdict.checks += _of_the_file(file)
        representative = np.arange(len(file))
        if not inputs and not (named and all(Path(name).is_file() for name in named)):
            where = f"at {', '.join(named)}" if named else "known"
            verdict.notes.append(f"the FASTA is not {where}: not compared; say where it is with --fasta")
        else:
            verdict.environment["inputs"] = list(named)
            config = _settings_as_config(settings, named, path)
            with scratch.folder() as spool:
                table = fasta.index(
                    fasta.open_sources(named, Path(spool)),
                    on_invalid=config.invalid,
                    gaps=config.gaps,
                    dedup=config.dedup,
                )
                if (records := file.records) is not None and ((records >= 0) & (records < len(table))).all():
                    table = table.part(records)
                checks, representative = _of_the_input(file, settings, table, config, representative)
                checks += _by_the_plain_reader(file, named, config)
            verdict.checks += checks
        out.print("reading every row", style="dim")
        verdict.checks += [replace(check, part=ROWS) for check in audit.stored(file, settings, representative)]
    for note in verdict.notes:
        out.print(note, style="yellow")
    out.print(verdict.table())
    if report_path:
        report.save(report_path, verdict.to_json())
    return verdict


def _check(part: str, what: str, wrong: bool | np.bool_, note: str) -> Check:
    return Check(part, what, not wrong, note=note if wrong else "")


def _of_the_file(file: store.EmbeddingFile) -> list[Check]:
    pending = int((file.status == store.PENDING).sum())
    checks = [
        _check(FILE, "complete", not file.complete, "the run that writes it has not finished"),
        _check(FILE, "no record pending", pending > 0, f"{pending:,} are"),
    ]
    if file.complete:
        differs = "its bytes are not those that embed wrote: copy it again, or embed again"
        what = differs if file.checksum_of_the_run else "it has none"
        checks.append(_check(FILE, "checksum of all bytes", not file.unaltered, what))
    return checks


def _settings_as_config(settings: dict[str, Any], inputs: tuple[str, ...], path: str) -> EmbedConfig:
    known = {f.name for f in fields(EmbedConfig)} - {"layers", "pool", "dtype", "attention", "device"}
    try:
        return EmbedConfig(inputs, "none.h5", **{name: value for name, value in settings.items() if name in known})
    except UserError as error:
        raise UserError(f"{path} is damaged: {error.what}", "Copy it again, or embed again.") from None


def _by_the_plain_reader(file: store.EmbeddingFile, inputs: tuple[str, ...], config: EmbedConfig) -> list[Check]:
    """Names, lengths and replaced residues once more, by a reader that shares no code with the index."""
    every = ((header, text) for path in inputs for header, text in plain_reader.records(path))
    numbers = range(len(file)) if file.records is None else file.records.tolist()
    wrong = {"names": 0, "lengths": 0, "replaced residues": 0}
    at, missing = -1, 0
    for rows in store.blocks(len(file)):
        names = file.names_of(rows.start, rows.stop)
        for name, number, row in zip(names, numbers[rows], range(rows.start, rows.stop), strict=True):
            header, text = b"", None
            while at < number and (record := next(every, None)) is not None:
                (header, text), at = record, at + 1
            if text is None or at != number:
                missing += 1
                continue
            _, length, replaced = plain_reader.clean(text, config.gaps)
            wrong["names"] += plain_reader.name_of(header, config.id == "full") != name
            wrong["lengths"] += length != file.lengths[row]
            wrong["replaced residues"] += replaced != file.replaced[row]
    more = file.records is None and next(every, None) is not None
    return [
        _check(INPUT, "records, by a second reader", bool(missing or more), "another number of them"),
        *(_check(INPUT, f"{what}, by a second reader", bool(n), f"{n:,} differ") for what, n in wrong.items()),
    ]


def _of_the_input(
    file: store.EmbeddingFile,
    settings: dict[str, Any],
    table: fasta.RecordTable,
    config: EmbedConfig,
    representative: Any,
) -> tuple[list[Check], Any]:
    checks = [
        _check(INPUT, "content (SHA-256)", settings["input_sha256"] != table.sha256, "not what was embedded"),
        _check(INPUT, "records", len(table) != len(file), f"{len(table):,} in the FASTA, {len(file):,} in the file"),
    ]
    if len(table) != len(file):
        return checks, representative
    work = decide(table, config)
    settled = file.status != store.PENDING
    settled &= ~((file.status == store.SKIPPED) & np.isin(file.reason, store.AFTER_TRYING))

    def rows(what: str, wrong: Any) -> Check:
        count, first = int(wrong.sum()), int(wrong.argmax()) if len(wrong) else 0
        return _check(INPUT, what, count > 0, f"{count:,} differ, the first is record {first + 1:,}")

    names = np.zeros(len(table), np.bool_)
    for block in store.blocks(len(table)):
        there = file.names_of(block.start, block.stop)
        here = table.names(block.start, block.stop, config.id == "full")
        if there != here:
            names[block] = [a != b for a, b in zip(there, here, strict=True)]
    status = np.where(work.status == store.PENDING, store.DONE, work.status)
    checks += [
        rows("ids", names),
        rows("lengths", file.lengths != table.length),
        rows("replaced residues", file.replaced != table.replaced),
        rows("statuses and reasons", settled & ((file.status != status) | (file.reason != work.reason))),
        rows("flags", (file.flags & ~np.uint16(store.RECOMPUTED | store.CACHED)) != work.flags),
    ]
    return checks, work.representative
