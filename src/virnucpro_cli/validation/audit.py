"""The audit of a file that `embed` wrote: columns against a plain reading of the FASTA, some rows against the oracle.

Settings come from the file's fingerprint.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import report, store
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.fasta.plain import refuse_unreadable
from virnucpro_cli.kinds import PROTEIN, pooled
from virnucpro_cli.model import adapters, locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import reading_of
from virnucpro_cli.plan.packing import window_weights, windowed_segments
from virnucpro_cli.validation import agreement, gates, oracle, oracle_of, plain_reader, records
from virnucpro_cli.validation.oracle import Oracle
from virnucpro_cli.validation.plain_reader import PlainTable
from virnucpro_cli.validation.records import Expected, check, cut_unknown
from virnucpro_cli.validation.verdict import Check, Verdict

STORED_FP16 = 5e-4
"""The error that rounding to fp16 on the way into the file may add."""

FILE, VALUES = "File: what it says of itself and of the FASTA", "Values: stored rows against the reference in fp32"
NOT_FINITE_CHECKED = 3


def audit_file(config: ValidateConfig, out: Console, clock: report.Clock) -> Verdict:
    """Audit `config.against`. Raises UserError if it is not a file of ours or its input or weights cannot be found."""
    path = config.against
    assert path is not None
    with store.opened(path) as file:
        if file.records is not None:
            raise UserError(
                f"{path} is a shard: its rows are not in the order of the FASTA.",
                "Audit a file that virnucpro merge made; virnucpro verify checks a shard.",
            )
        paths = _inputs(file, config)
        out.print(f"reading {', '.join(paths)}", style="dim")
        with clock.stage("read FASTA"):
            letters = plain_reader.letters_of(reading_of(file.attributes))
            table = plain_reader.read(paths, file.settings["id"], file.settings.get("gaps", "keep"), letters)
        weights = weights_of(file, path, config.model, config.adapter, out)
        device = devices.resolve_device(config.reference_device, "--reference-device")
        spec, state, notes = model_weights.load(weights)
        family = oracle_of(spec, file.settings.get("kind", PROTEIN), locate.tokenizer_of(weights, spec))
        verdict = Verdict("validate --against", notes=list(notes))
        verdict.environment = {
            "file": path,
            "inputs": list(paths),
            "model": file.attributes["model"],
            "written by": f"virnucpro {file.attributes['tool_version']}",
            "device": file.attributes["device"],
            "dtype": f"{file.settings['dtype']}, stored as {file.settings['store_dtype']}",
            "attention": file.attributes["attention"],
            **family.environment(weights, device),
        }
        verdict.checks += _of_the_file(file, table, weights)
        if len(table.lengths) != len(file):
            return verdict  # rows cannot be matched with records
        expected = _expected(table, file.settings, file.columns.get("tokens", table.lengths))
        verdict.checks += records.compared(file, expected, plain_reader.other_names(file, table.names), FILE)
        verdict.checks += records.stored(file, expected.representative, FILE)
        rows, left_out = _sampled(file, table, config)
        verdict.notes += left_out
        if not len(rows):
            verdict.checks.append(Check(VALUES, "rows that can be compared", False, note="there are none"))
            return verdict
        compared = f"{len(rows):,} of {counted(len(file), file.words[0])}"
        verdict.environment["sample"] = f"{compared}, seed {config.seed}"
        out.print(f"reference: {compared} in fp32 on {device.type}", style="dim")
        with clock.stage("reference"):
            judge = family(spec, state, device)
            verdict.records = [_numbers(file, *record, judge) for record in _records(paths, rows)]
        verdict.checks += _of_the_values(file, verdict.records, config)
    return verdict


def model_of(file: store.EmbeddingFile, named: str | None) -> str:
    """The model that is named, or else the one that the run of the file was given."""
    return named or str(json.loads(file.attributes["config"])["model"])


def model_files(file: store.EmbeddingFile, named: str | None, adapter: tuple[str, ...] = ()) -> list[Path]:
    """Files of the model and adapters that are named, or that the run of the file was given."""
    return locate.files_read(model_of(file, named), adapters_of(file, adapter))


def adapters_of(file: store.EmbeddingFile, named: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters that are named, or else those that the run of the file was given."""
    return named or tuple(json.loads(file.attributes["config"]).get("adapter", ()))


def weights_of(
    file: store.EmbeddingFile, path: str, named: str | None, adapter: tuple[str, ...], out: Console
) -> locate.Weights:
    """The weights that are named, or else those that the file at `path` names; the caller checks that they are its own.

    Raises UserError if they are not here and cannot be fetched.
    """
    model = model_of(file, named)
    try:
        found = locate.fetch(model, lambda text: out.print(text))
        return locate.verified(adapters.with_adapters(found, adapters_of(file, adapter)))
    except UserError as error:
        if named or adapters_of(file, ()):
            raise
        raise UserError(
            f"{path} was made with --model {model}, which is not here. {error.what}",
            "Say where those weights are: --model PATH.",
        ) from None


def _inputs(file: store.EmbeddingFile, config: ValidateConfig) -> tuple[str, ...]:
    """The FASTA files. Raises UserError if one is unknown or unreadable, or if the report would overwrite an input."""
    path = str(config.against)
    paths = config.fasta or tuple(entry["path"] for entry in file.inputs)
    if not paths:
        raise UserError(f"{path} does not say what was embedded.", "Name it: --fasta FILE")
    report.check_places({"report": config.report}, [path, *paths, *model_files(file, config.model, config.adapter)])
    try:
        refuse_unreadable(paths)
    except UserError as error:
        remedy = f"{error.remedy} Say where the input of {path} is: --fasta FILE."
        raise UserError(error.what, remedy) from None
    return paths


def _of_the_file(file: store.EmbeddingFile, table: PlainTable, weights: locate.Weights) -> list[Check]:
    """Completeness, input, weights, and whether the file's attributes say what its fingerprint says."""
    settings, said = file.settings, json.loads(file.attributes["config"])
    pending, count = int((file.status == store.PENDING).sum()), len(table.lengths)
    kinds = pooled(settings["pool"])
    default = f"{kinds[0]}/{settings['layers'][-1]}" if kinds else None
    there = {name: said.get(name) for name in ("max_residues", "long", "invalid", "id", "dedup", "store_dtype")}
    there |= {name: file.attributes.get(name) for name in ("dtype", "weights_sha256", "attention")}
    there |= {name: json.loads(file.attributes[name]) for name in ("layers", "pool")}
    there["input_sha256"] = [entry["sha256"] for entry in file.inputs]
    differing = [name for name, value in there.items() if value != settings[name]]
    other_weights = settings["weights_sha256"] not in (weights.sha256, store.UNKNOWN)
    return [
        check(FILE, what, wrong, note)
        for what, wrong, note in (
            ("complete", not file.complete or pending, f"run/complete is {int(file.complete)}, {pending:,} pending"),
            ("input", settings["input_sha256"] != table.sha256, "the FASTA is not the one that was embedded"),
            ("weights", other_weights, f"{weights.place} are not those of the run"),
            ("records", count != len(file), f"{count:,} in the FASTA, {counted(len(file), 'row')}"),
            ("/embeddings", file.default != default, f"it is {file.default}, and should be {default}"),
            ("attributes agree with the fingerprint", differing, f"{', '.join(differing)} differ"),
        )
    ]


def _expected(table: PlainTable, settings: dict[str, Any], sizes: NDArray[Any]) -> Expected:
    """The policies once more, without the code of embed. sizes: int [n], tokens of each record."""
    lengths, longest = table.lengths, settings["max_residues"]
    long = sizes > longest
    reason = np.zeros(len(lengths), np.uint8)
    reason[long & (settings["long"] == "skip")] = store.TOO_LONG
    reason[(table.replaced > 0) & (settings["invalid"] == "skip")] = store.INVALID
    reason[lengths == 0] = store.EMPTY
    kept = reason == 0
    representative = np.arange(len(lengths))
    if settings["dedup"]:
        _, first, group = np.unique(table.sequences[kept], return_index=True, return_inverse=True)
        representative[kept] = np.flatnonzero(kept)[first][group]
    embedded = np.where(kept, np.minimum(sizes, longest) if settings["long"] == "truncate" else sizes, 0)
    flags = np.zeros(len(lengths), np.uint16)
    for bit, mask in (
        (store.TRUNCATED, kept & long & (settings["long"] == "truncate")),
        (store.WINDOWED, kept & long & (settings["long"] == "window")),
        (store.REPLACED, table.replaced > 0),
        (store.COPIED, representative != np.arange(len(lengths))),
    ):
        flags[mask] |= bit
    return Expected(lengths, table.replaced, embedded, flags, reason, representative)


def _sampled(
    file: store.EmbeddingFile, table: PlainTable, config: ValidateConfig
) -> tuple[NDArray[np.int64], list[str]]:
    """Rows to compare, int64 [n], and notes on those left out.

    They are a stratified sample of what is done, and the first few that were given up as not finite.
    """
    settings, lengths, notes = file.settings, table.lengths, []
    piece = lengths if settings["long"] == "full" else np.minimum(lengths, settings["max_residues"])
    longest, why = oracle.LONGEST, "eager attention does not fit"
    if cut_unknown(settings):
        longest, why = min(longest, settings["max_residues"]), "they may have been cut"
    fits = (piece <= longest) & (lengths > 0)
    done = (file.status == store.DONE) & (lengths > 0)
    if left_out := int((done & ~fits).sum()):
        word, letter = file.words
        notes.append(f"{counted(left_out, word)} of more than {longest:,} {letter}s not compared: {why}")
    overflowed = np.flatnonzero(fits & (file.status == store.SKIPPED) & (file.reason == store.NOT_FINITE))
    if len(overflowed):
        rows = counted(len(overflowed), "row")
        notes.append(f"{rows} NaN, since the run found them not finite; the first are checked")
    able = np.flatnonzero(done & fits)
    if not len(able):
        return able, notes
    chosen = able[oracle.stratified(lengths[able], table.odd[able], config.sample, config.seed)]
    return np.sort(np.append(chosen, overflowed[:NOT_FINITE_CHECKED])), notes


def _records(paths: tuple[str, ...], rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """Number and text of the records in `rows`."""
    wanted = set(rows.tolist())
    every = (text for path in paths for _, text in plain_reader.records(path))
    return ((row, text) for row, text in enumerate(every) if row in wanted)


def _numbers(file: store.EmbeddingFile, row: int, text: bytes, judge: Oracle) -> dict[str, Any]:
    """Name, residues, and relative L2 and cosine of every row that is stored of a record."""
    cleaned, *_ = plain_reader.clean(text, file.settings.get("gaps", "keep"), judge.letters)
    expected = _oracle_rows(cleaned, file.settings, judge)
    (name,) = file.names_of(row, row + 1)
    numbers: dict[str, Any] = {"row": row, "name": name, "residues": int(file.lengths[row])}
    for kind, layer in expected:
        ours = file.residues(row, layer) if kind == "residue" else file.dataset(kind, layer)[row]
        a, b = np.asarray(ours, np.float64), expected[kind, layer]
        if file.status[row] == store.SKIPPED and not np.isfinite(b).all():
            continue  # rightly given up
        error, cosine = float("inf"), -1.0
        if a.shape == b.shape and np.isfinite(a).all():
            error = float(agreement.relative_l2(a.ravel(), b.ravel()))
            cosine = float(agreement.cosine(a.ravel(), b.ravel()))
        numbers |= {f"{kind}/{layer} relative L2": error, f"{kind}/{layer} cosine": cosine}
    return numbers


def _of_the_values(file: store.EmbeddingFile, numbers: list[dict[str, Any]], config: ValidateConfig) -> Iterator[Check]:
    settings = file.settings
    known = {str(dtype).removeprefix("torch."): short for short, dtype in devices.DTYPES.items()}
    compute = known.get(settings["dtype"], "fp16")  # of another tool's file, where it is not known
    min_cosine, limit = gates.limits(config, compute)
    if config.max_rel_l2 is None and settings["store_dtype"] == "fp16":
        limit += STORED_FP16
    for layer in settings["layers"]:
        for kind in settings["pool"]:
            column, gate = f"{kind}/{layer}", limit * (2 if kind == "residue" else 1)
            compared = [each for each in numbers if f"{column} cosine" in each]
            if not compared:
                continue
            names = [each["name"] for each in compared]
            error = np.array([each[f"{column} relative L2"] for each in compared])
            passed, what = bool(error.max() <= gate), f"{kind}, layer {layer}"
            yield Check.of(VALUES, f"{what}: relative L2", error, names, passed=passed, limit=f"{gate:.1e}")
            if kind != "residue":
                cosine = np.array([each[f"{column} cosine"] for each in compared])
                passed = bool(cosine.min() >= min_cosine)
                yield Check.of(VALUES, f"{what}: cosine", cosine, names, True, passed=passed, limit=f">= {min_cosine}")


def _oracle_rows(text: str, settings: dict[str, Any], judge: Oracle) -> oracle.Rows:
    """The oracle's rows of one protein under the run's policy for long ones, of the kinds and layers of the run."""
    first, *ids, end = judge.encode(text, settings["max_residues"] if settings["long"] == "truncate" else None)
    starts, window = [0], len(ids)
    if settings["long"] == "window" and len(ids) > settings["max_residues"]:
        window = settings["max_residues"]
        segments = windowed_segments(np.zeros(1, np.int64), np.array([len(ids)]), window, settings["overlap"])
        starts = segments.start.tolist()
    layers = {layer: judge.spec.layers if layer == -1 else layer for layer in settings["layers"]}  # -1: an import's
    residues = {layer: np.zeros((len(ids), judge.spec.hidden)) for layer in layers}
    bos = {layer: np.zeros(judge.spec.hidden) for layer in layers}
    eos = {}
    for start, weight in zip(starts, window_weights(len(ids), tuple(starts), window), strict=True):
        hidden = judge.embed([first, *ids[start : start + window], end], list(layers.values()))
        for layer, number in layers.items():
            rows = hidden[number].double().cpu().numpy()
            residues[layer][start : start + window] += rows[1:-1] * weight[:, None]
            bos[layer] += rows[0] * (weight.sum() / len(ids))
            eos[layer] = rows[-1]
    of_layer = {
        layer: {"residue": residues[layer], **oracle.pooled(residues[layer], bos[layer], eos[layer])}
        for layer in layers
    }
    return {(kind, layer): of_layer[layer][kind] for layer in layers for kind in settings["pool"]}
