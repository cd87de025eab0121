"""The verify workflow: a finished file against its checksum and, record by record, against its FASTA. No model."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import fasta, report, scratch, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta.tokenised import as_counted
from virnucpro_cli.model.families import reading_of
from virnucpro_cli.plan.policies import POLICIES, decide
from virnucpro_cli.validation import plain_reader, records
from virnucpro_cli.validation.records import check
from virnucpro_cli.validation.verdict import Check, Verdict

FILE, INPUT, ROWS = "File", "FASTA", "Rows"


def verify_file(path: str, inputs: tuple[str, ...] = (), report_path: str | None = None) -> Verdict:
    """Check the file; inputs: its FASTA, by default where the file says it was. Raises UserError if it is not ours."""
    out = report.console()
    verdict = Verdict("verify")
    with store.opened(path) as file:
        named = inputs or tuple(entry["path"] for entry in file.inputs)
        report.check_places({"report": report_path}, [path, *named])
        verdict.environment = {"file": path, "written by": f"virnucpro {file.attributes['tool_version']}"}
        verdict.checks += _of_the_file(file)
        representative = np.arange(len(file))
        if inputs or (named and all(Path(name).is_file() for name in named)):
            verdict.environment["inputs"] = list(named)
            checks, representative = _of_the_input(file, named, path)
            verdict.checks += [*checks, *_by_the_plain_reader(file, named)]
        else:
            missing = f"at {', '.join(named)}" if named else "known"
            verdict.notes.append(f"the FASTA is not {missing}: not compared; say where it is with --fasta")
        out.print("reading every row", style="dim")
        verdict.checks += records.stored(file, representative, ROWS)
    verdict.show(out, report_path)
    return verdict


def _of_the_file(file: store.EmbeddingFile) -> list[Check]:
    pending = int((file.status == store.PENDING).sum())
    checks = [
        check(FILE, "complete", not file.complete, "the run that writes it has not finished"),
        check(FILE, "no record pending", pending, f"{pending:,} are"),
    ]
    if file.complete:
        differs = "its bytes are not those that embed wrote: copy it again, or embed again"
        note = differs if file.checksum_of_the_run else "it has none"
        checks.append(check(FILE, "checksum of all bytes", not file.unaltered, note))
    return checks


def _of_the_input(
    file: store.EmbeddingFile, paths: tuple[str, ...], path: str
) -> tuple[list[Check], NDArray[np.int64]]:
    """Checks against the index and the policies of embed, and the representative of each record, int64 [N]."""
    try:
        policies = {name: file.settings[name] for name in POLICIES if name in file.settings}
        config = EmbedConfig(paths, "none.h5", **policies)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error.what}", "Copy it again, or embed again.") from None
    with scratch.folder() as spool:
        sources = fasta.open_sources(paths, Path(spool))
        table = fasta.index(
            sources, on_invalid=config.invalid, gaps=config.gaps, dedup=config.dedup,
            reading=reading_of(file.attributes),
        )  # fmt: skip
        if (shard := file.records) is not None and _within(shard, len(table)):
            table = table.part(shard)
        note = f"{len(table):,} in the FASTA, {len(file):,} in the file"
        checks = [
            check(INPUT, "content (SHA-256)", file.settings["input_sha256"] != table.sha256, "not what was embedded"),
            check(INPUT, "records", len(table) != len(file), note),
        ]
        if len(table) != len(file):
            return checks, np.arange(len(file))
        if "tokens" in file.columns:  # which the tokenizer alone can tell
            table = as_counted(table, file.columns["tokens"])
        decisions = decide(table, config)
        other = np.zeros(len(table), np.bool_)
        for block in store.blocks(len(table)):
            names = table.names(block.start, block.stop, config.id == "full")
            there = file.names_of(block.start, block.stop)
            other[block] = [a != b for a, b in zip(names, there, strict=True)]
    instead = decisions.representative.astype(np.int64)
    expected = records.Expected(
        table.length, table.replaced, decisions.embedded, decisions.flags, decisions.reason, instead
    )
    return [*checks, *records.compared(file, expected, other, INPUT)], instead


def _within(shard: NDArray[np.int64], count: int) -> bool:
    return bool(((shard >= 0) & (shard < count)).all())


def _by_the_plain_reader(file: store.EmbeddingFile, paths: tuple[str, ...]) -> list[Check]:
    """Names, lengths and replaced residues once more, by a reader that shares no code with the index."""
    letters = plain_reader.letters_of(reading_of(file.attributes))
    table = plain_reader.read(paths, file.settings["id"], file.settings.get("gaps", "keep"), letters)
    rows = np.arange(len(file)) if file.records is None else file.records
    count = len(table.lengths)
    same = count == len(file) if file.records is None else _within(rows, count)
    checks = [check(INPUT, "records, by a second reader", not same, "another number of them")]
    if same:
        wrong = {
            "names": plain_reader.other_names(file, table.names[rows]),
            "lengths": table.lengths[rows] != file.lengths,
            "replaced residues": table.replaced[rows] != file.replaced,
        }
        for what, mask in wrong.items():
            checks.append(check(INPUT, f"{what}, by a second reader", mask.any(), f"{mask.sum():,} differ"))
    return checks
