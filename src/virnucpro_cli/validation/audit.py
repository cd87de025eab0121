"""The audit of a file that `embed` wrote: its ids, lengths and statuses against the FASTA, a sample of rows against the
reference. Model and settings come from the file itself.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import report, runner, store
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate, reference
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.reference import Reference
from virnucpro_cli.packing import window_weights, windowed_segments
from virnucpro_cli.validation import agreement, gates, oracle
from virnucpro_cli.validation.verdict import Check, Verdict

STORED_FP16 = 5e-4
"""What rounding to fp16 on the way into the file may add."""

FILE, VALUES = "File: what it says of itself and of the FASTA", "Values: stored rows against fair-esm in fp32"


@dataclass(frozen=True)
class _Table:
    """What a plain reading of the FASTA says of every record."""

    sha256: list[str]
    names: list[str]
    lengths: NDArray[np.int64]
    replaced: NDArray[np.int64]
    odd: NDArray[np.uint16]


def run(config: ValidateConfig, out: Console, clock: report.Clock) -> Verdict:
    """Audit `config.against`. Raises UserError if it is not a file of ours or its input or weights cannot be found."""
    assert config.against is not None
    with _open(config.against) as file:
        settings = json.loads(file.attributes["config"])
        fingerprint = json.loads(file.attributes["fingerprint"])
        paths = config.fasta or tuple(entry["path"] for entry in json.loads(file.attributes["inputs"]))
        if missing := [path for path in paths if not Path(path).is_file()]:
            raise UserError(
                f"The input {missing[0]} of {config.against} is not there.", "Say where it is: --fasta FILE."
            )
        out.print(f"reading {', '.join(paths)}", style="dim")
        with clock.stage("read FASTA"):
            table = _read(paths, settings["id"])
        found = locate.verified(locate.fetch(config.model or settings["model"], lambda text: out.print(text)))
        verdict = Verdict("validate --against")
        verdict.environment = {
            "file": config.against,
            "inputs": list(paths),
            "model": file.attributes["model"],
            "weights": found.place,
            "written by": f"virnucpro {file.attributes['tool_version']}",
            "device": file.attributes["device"],
            "dtype": f"{file.attributes['dtype']}, stored as {file.attributes['store_dtype']}",
            "attention": file.attributes["attention"],
        }
        verdict.checks += _of_the_file(file, table, settings, fingerprint, found)
        if len(table.names) != len(file):
            return verdict  # rows cannot be matched with records
        verdict.checks += _finite(file, settings)
        rows = _sampled(file, table, settings, config)
        spec, state, notes = model_weights.load(found)
        verdict.notes += notes
        judge = Reference(spec, state, runner.resolve_device(config.reference_device))
        out.print(f"reference: {len(rows)} of {len(file):,} proteins in fp32 on {judge.device.type}", style="dim")
        with clock.stage("reference"):
            verdict.checks += _of_the_values(file, table, paths, rows, settings, judge, config, verdict.records)
    return verdict


def _open(path: str) -> store.EmbeddingFile:
    try:
        file = store.read_embeddings(path)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.", "Name a file that virnucpro embed wrote.") from None
    except OSError:
        raise UserError(f"{path} is not a readable HDF5 file.", "Name a file that virnucpro embed wrote.") from None
    if "fingerprint" not in file.attributes:
        raise UserError(f"{path} was not written by virnucpro embed.")
    return file


def _read(paths: tuple[str, ...], id_policy: str) -> _Table:
    shas, names, lengths, replaced, odd = [], [], [], [], []
    for path in paths:
        sha = hashlib.sha256()
        for header, text in reference.records(path, sha):
            _, length, wrong = reference.clean(text)
            upper = text.upper()
            names.append(header if id_policy == "full" else "".join(header.split(None, 1)[:1]))
            lengths.append(length)
            replaced.append(wrong)
            odd.append(
                sum(1 << bit for bit, code in enumerate(oracle.ODD_LETTERS) if code in upper) | bool(wrong) << 15
            )
        shas.append(sha.hexdigest())
    return _Table(
        shas, names, np.asarray(lengths, np.int64), np.asarray(replaced, np.int64), np.asarray(odd, np.uint16)
    )


def _of_the_file(
    file: store.EmbeddingFile, table: _Table, settings: dict[str, Any], fingerprint: dict[str, Any],
    found: locate.Weights,
) -> list[Check]:  # fmt: skip
    def check(what: str, wrong: int | bool, note: str) -> Check:
        return Check(FILE, what, not wrong, note=note if wrong else "")

    pending = int((file.status == store.PENDING).sum())
    checks = [
        check("complete", not file.complete or pending > 0, f"{pending:,} rows pending"),
        check("input", fingerprint["input_sha256"] != table.sha256, "the FASTA is not the one that was embedded"),
        check("weights", fingerprint["weights_sha256"] != found.sha256, f"{found.place} are not those of the run"),
        check("records", len(table.names) != len(file), f"{len(table.names):,} in the FASTA, {len(file):,} rows"),
    ]
    if len(table.names) != len(file):
        return checks
    long = table.lengths > settings["max_residues"]
    reason = np.zeros(len(file), np.uint8)
    reason[long & (settings["long"] == "skip")] = store.TOO_LONG
    reason[(table.replaced > 0) & (settings["invalid"] == "skip")] = store.INVALID
    reason[table.lengths == 0] = store.EMPTY
    kept = reason == 0
    skipped = (file.status == store.SKIPPED) & (file.reason != store.NOT_FINITE)

    def flag(bit: int) -> NDArray[np.bool_]:
        return (file.flags & bit) > 0

    def rows(what: str, wrong: NDArray[np.bool_]) -> Check:
        first = f"{int(wrong.sum()):,} rows, the first {int(wrong.argmax())} ({table.names[int(wrong.argmax())]})"
        return check(what, bool(wrong.any()), first)

    names = np.asarray([a != b for a, b in zip(table.names, file.names, strict=True)], np.bool_)
    return [
        *checks,
        rows("ids", names),
        rows("lengths", table.lengths != file.lengths),
        rows("skipped, and why", (skipped != ~kept) | (skipped & (file.reason != reason))),
        rows("truncated", flag(store.TRUNCATED) != (kept & long & (settings["long"] == "truncate"))),
        rows("windowed", flag(store.WINDOWED) != (kept & long & (settings["long"] == "window"))),
        rows("replaced", flag(store.REPLACED) != (table.replaced > 0)),
    ]


def _finite(file: store.EmbeddingFile, settings: dict[str, Any]) -> list[Check]:
    """Every pooled row: finite where it is done, NaN where it is skipped."""
    wrong = 0
    for kind in [kind for kind in settings["pool"] if kind != "residue"]:
        for layer in file.layers:
            for start in range(0, len(file), store.NAME_BLOCK):
                rows = file.dataset(kind, layer)[start : start + store.NAME_BLOCK]
                status = file.status[start : start + len(rows)]
                wrong += int((~np.isfinite(rows).all(axis=1) & (status == store.DONE)).sum())
                wrong += int((~np.isnan(rows).all(axis=1) & (status == store.SKIPPED)).sum())
    return [Check(FILE, "done rows finite, skipped rows NaN", wrong == 0, note=f"{wrong:,} are not" if wrong else "")]


def _sampled(
    file: store.EmbeddingFile, table: _Table, settings: dict[str, Any], config: ValidateConfig
) -> NDArray[np.int64]:
    piece = table.lengths if settings["long"] == "full" else np.minimum(table.lengths, settings["max_residues"])
    able = np.flatnonzero((file.status == store.DONE) & (piece <= oracle.LONGEST) & (table.lengths > 0))
    if not len(able):
        raise UserError(f"{config.against} has no row that could be checked.")
    return able[oracle.stratified(table.lengths[able], table.odd[able], config.sample, config.seed)]


def _of_the_values(
    file: store.EmbeddingFile, table: _Table, paths: tuple[str, ...], rows: NDArray[np.int64],
    settings: dict[str, Any], judge: Reference, config: ValidateConfig, records: list[dict[str, Any]],
) -> list[Check]:  # fmt: skip
    compute = next(short for short, dtype in runner.DTYPES.items() if str(dtype).endswith(file.attributes["dtype"]))
    limit = config.max_rel_l2 or gates.MAX_REL_L2[compute] + (STORED_FP16 if settings["store_dtype"] == "fp16" else 0)
    errors: dict[tuple[str, int], list[float]] = {}
    cosines: dict[tuple[str, int], list[float]] = {}
    wanted = set(rows.tolist())
    every = (record for path in paths for record in reference.records(path))
    for row, (_, text) in enumerate(every):
        if row not in wanted:
            continue
        mine: dict[str, Any] = {"row": row, "name": table.names[row], "residues": int(table.lengths[row])}
        for layer, expected in _expected(reference.clean(text)[0], file.layers, settings, judge).items():
            for kind in settings["pool"]:
                found = file.residues(row, layer) if kind == "residue" else file.dataset(kind, layer)[row]
                a, b = np.asarray(found, np.float64), expected[kind]
                if a.shape != b.shape:
                    error, cosine = float("inf"), -1.0
                else:
                    error = float(agreement.relative_l2(a.ravel(), b.ravel()))
                    cosine = float(agreement.cosine(a.ravel(), b.ravel()))
                errors.setdefault((kind, layer), []).append(error)
                cosines.setdefault((kind, layer), []).append(cosine)
                mine |= {f"{kind}/{layer} relative L2": error, f"{kind}/{layer} cosine": cosine}
        records.append(mine)
    checks = []
    for kind, layer in errors:
        each, cosine_of = np.asarray(errors[kind, layer]), np.asarray(cosines[kind, layer])
        gate = limit * (2 if kind == "residue" else 1)
        worst, low = int(each.argmax()), int(cosine_of.argmin())
        checks.append(Check(
            VALUES, f"{kind}, layer {layer}: relative L2", bool(each[worst] <= gate), float(np.median(each)), float(np.quantile(each, 0.99)), float(each[worst]), records[worst]["name"], limit=f"{gate:.1e}",
        ))  # fmt: skip
        if kind != "residue":
            checks.append(Check(
                VALUES, f"{kind}, layer {layer}: cosine", bool(cosine_of[low] >= config.min_cosine),
                float(np.median(cosine_of)), worst=float(cosine_of[low]), record=records[low]["name"],
                limit=f">= {config.min_cosine}",
            ))  # fmt: skip
    return checks


def _expected(
    text: str, layers: list[int], settings: dict[str, Any], judge: Reference
) -> dict[int, dict[str, NDArray[np.float64]]]:
    """The reference's rows of one protein under the run's policy for long ones."""
    ids = reference.encode(text)[1:-1]
    whole = len(ids)
    longest = settings["max_residues"]
    if settings["long"] == "truncate":
        ids, whole = ids[:longest], min(whole, longest)
    starts, window = [0], whole
    if settings["long"] == "window" and whole > longest:
        segments = windowed_segments(np.zeros(1, np.int64), np.asarray([whole]), longest, settings["overlap"])
        starts, window = segments.start.tolist(), longest
    weights = window_weights(whole, tuple(starts), window)
    found = {
        layer: {"residue": np.zeros((whole, judge.spec.hidden)), "bos": np.zeros(judge.spec.hidden)} for layer in layers
    }
    for start, weight in zip(starts, weights, strict=True):
        piece = [reference.encode("")[0], *ids[start : start + window], reference.encode("")[-1]]
        for layer, hidden in judge.embed(piece, layers).items():
            rows = hidden.double().cpu().numpy()
            found[layer]["residue"][start : start + window] += rows[1:-1] * weight[:, None]
            found[layer]["bos"] += rows[0] * (weight.sum() / whole)
    for layer in layers:
        found[layer]["mean"] = found[layer]["residue"].mean(axis=0)
    return found
