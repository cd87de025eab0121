"""The audit of a file that `embed` wrote: its ids, lengths and statuses against the FASTA, a sample of rows against the
reference. Settings come from the file's fingerprint.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.kinds import any_by_residue, by_residue, pooled, unmasked
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.plan.packing import window_weights, windowed_segments
from virnucpro_cli.validation import agreement, gates, oracle, plain_reader, reference
from virnucpro_cli.validation.reference import Reference
from virnucpro_cli.validation.verdict import Check, Verdict

STORED_FP16 = 5e-4
"""What rounding to fp16 on the way into the file may add."""

FILE, VALUES = "File: what it says of itself and of the FASTA", "Values: stored rows against fair-esm in fp32"
KNOWN_FLAGS = sum(store.FLAG_NAMES)
NOT_FINITE_CHECKED = 3


@dataclass(frozen=True)
class _Table:
    """What a plain reading of the FASTA says of every record. digest: void [N], of the cleaned sequence."""

    sha256: list[str]
    names: list[str]
    lengths: NDArray[np.int64]
    replaced: NDArray[np.int64]
    odd: NDArray[np.uint16]
    digest: NDArray[Any]


def audit_file(config: ValidateConfig, out: Console, clock: report.Clock) -> Verdict:
    """Audit `config.against`. Raises UserError if it is not a file of ours or its input or weights cannot be found."""
    assert config.against is not None
    with store.opened(config.against) as file:
        settings = file.settings
        if file.records is not None:
            raise UserError(
                f"{config.against} is a shard: its rows are not in the order of the FASTA.",
                "Audit a file that virnucpro merge made; virnucpro verify checks a shard.",
            )
        paths = config.fasta or tuple(entry["path"] for entry in json.loads(file.attributes["inputs"]))
        if not paths:
            raise UserError(f"{config.against} does not say what was embedded.", "Name it: --fasta FILE")
        model = model_of(file, config.model)
        report.check_places({"report": config.report}, [config.against, *paths, *locate.files_read(model)])
        try:
            fasta.refuse_unreadable(paths)
        except UserError as error:
            raise UserError(
                error.what, f"{error.remedy} Say where the input of {config.against} is: --fasta FILE."
            ) from None
        out.print(f"reading {', '.join(paths)}", style="dim")
        with clock.stage("read FASTA"):
            table = _read(paths, settings["id"], settings.get("gaps", "keep"))
        found = weights_of(file, config.against, config.model, out)
        device = devices.resolve_device(config.reference_device, "--reference-device")
        verdict = Verdict("validate --against")
        verdict.environment = {
            "file": config.against,
            "inputs": list(paths),
            "model": file.attributes["model"],
            "weights": found.place,
            "weights_sha256": found.sha256,
            "written by": f"virnucpro {file.attributes['tool_version']}",
            "device": file.attributes["device"],
            "dtype": f"{settings['dtype']}, stored as {settings['store_dtype']}",
            "attention": file.attributes["attention"],
            "virnucpro": virnucpro_cli.__version__,
            "torch": torch.__version__,
            "fair-esm": version("fair-esm"),
            "reference": reference.described(devices.describe_device(device)),
        }
        verdict.checks += _of_the_file(file, table, settings, found)
        if len(table.names) != len(file):
            return verdict  # rows cannot be matched with records
        verdict.checks += _of_the_rows(file, table, settings)
        rows = _sampled(file, table, settings, config, verdict)
        if not len(rows):
            verdict.checks.append(Check(VALUES, "rows that can be compared", False, note="there are none"))
            return verdict
        spec, state, notes = model_weights.load(found)
        verdict.notes += notes
        judge = Reference(spec, state, device)
        verdict.environment["sample"] = f"{len(rows):,} of {counted(len(file), 'row')}, seed {config.seed}"
        out.print(f"reference: {len(rows):,} of {counted(len(file), 'protein')} in fp32 on {device.type}", style="dim")
        with clock.stage("reference"):
            verdict.checks += _of_the_values(file, table, paths, rows, settings, judge, config, verdict.records)
    return verdict


def model_of(file: store.EmbeddingFile, named: str | None) -> str:
    """The model that is named, or else the one that the run of the file was given."""
    return named or str(json.loads(file.attributes["config"])["model"])


def weights_of(file: store.EmbeddingFile, path: str, named: str | None, out: Console) -> locate.Weights:
    """The weights that are named, or else those that the file at `path` names; whether they are its own is for the caller."""
    model = model_of(file, named)
    try:
        return locate.verified(locate.fetch(model, lambda text: out.print(text)))
    except UserError as error:
        if named:
            raise
        raise UserError(
            f"{path} was made with --model {model}, which is not here. {error.what}",
            "Say where those weights are: --model PATH.",
        ) from None


def _read(paths: tuple[str, ...], id_policy: str, gaps: str) -> _Table:
    shas, names, lengths, replaced, odd, digests = [], [], [], [], [], []
    for path in paths:
        sha = hashlib.sha256()
        for header, text in plain_reader.records(path, sha):
            cleaned, length, wrong = plain_reader.clean(text, gaps)
            names.append(plain_reader.name_of(header, id_policy == "full"))
            lengths.append(length)
            replaced.append(wrong)
            odd.append(oracle.oddities(text, wrong))
            digests.append(hashlib.blake2b(cleaned.encode(), digest_size=16).digest())
        shas.append(sha.hexdigest())
    digest = np.frombuffer(b"".join(digests), "V16")
    return _Table(
        shas, names, np.asarray(lengths, np.int64), np.asarray(replaced, np.int64), np.asarray(odd, np.uint16), digest
    )


def _check(what: str, wrong: int | bool, note: str) -> Check:
    return Check(FILE, what, not wrong, note=note if wrong else "")


def _of_the_file(
    file: store.EmbeddingFile, table: _Table, settings: dict[str, Any], found: locate.Weights
) -> list[Check]:
    """Completeness, input, weights, and whether the file's attributes say what its fingerprint says."""
    pending = int((file.status == store.PENDING).sum())
    kinds = pooled(settings["pool"])
    default = f"{kinds[0]}/{settings['layers'][-1]}" if kinds else None
    return [
        _check(
            "complete",
            not file.complete or pending > 0,
            f"run/complete is {int(file.complete)}, {counted(pending, 'row')} pending",
        ),
        _check("input", settings["input_sha256"] != table.sha256, "the FASTA is not the one that was embedded"),
        _check(
            "weights",
            settings["weights_sha256"] not in (found.sha256, store.UNKNOWN),
            f"{found.place} are not those of the run",
        ),
        _check(
            "records", len(table.names) != len(file), f"{len(table.names):,} in the FASTA, {counted(len(file), 'row')}"
        ),
        _check("/embeddings", file.default != default, f"it is {file.default}, and should be {default}"),
        *_attributes(file, settings),
    ]


def _attributes(file: store.EmbeddingFile, settings: dict[str, Any]) -> list[Check]:
    said = json.loads(file.attributes["config"])
    there = {name: said.get(name) for name in ("max_residues", "long", "invalid", "id", "dedup", "store_dtype")}
    there |= {name: file.attributes.get(name) for name in ("dtype", "weights_sha256", "attention")}
    there |= {name: json.loads(file.attributes[name]) for name in ("layers", "pool")}
    there["input_sha256"] = [entry.get("sha256") for entry in json.loads(file.attributes["inputs"])]
    differing = [name for name, value in there.items() if value != settings[name]]
    return [_check("attributes agree with the fingerprint", bool(differing), f"{', '.join(differing)} differ")]


def _of_the_rows(file: store.EmbeddingFile, table: _Table, settings: dict[str, Any]) -> list[Check]:
    """Every row's name, length, status, flags and finiteness."""
    n = len(file)
    long = table.lengths > settings["max_residues"]
    reason = np.zeros(n, np.uint8)
    reason[long & (settings["long"] == "skip")] = store.TOO_LONG
    reason[(table.replaced > 0) & (settings["invalid"] == "skip")] = store.INVALID
    reason[table.lengths == 0] = store.EMPTY
    kept = reason == 0
    representative = np.arange(n)
    if settings["dedup"] and kept.any():
        _, first, group = np.unique(table.digest[kept], return_index=True, return_inverse=True)
        representative[kept] = np.flatnonzero(kept)[first][group]
    given_up = (file.status == store.SKIPPED) & np.isin(file.reason, store.AFTER_TRYING) & kept
    skipped = file.status == store.SKIPPED
    right = np.where(
        given_up | kept & (file.status == store.PENDING), True, (skipped == ~kept) & (file.reason == reason)
    )
    embedded = np.where(
        kept,
        np.minimum(table.lengths, settings["max_residues"]) if settings["long"] == "truncate" else table.lengths,
        0,
    )

    def flag(bit: int) -> NDArray[np.bool_]:
        return (file.flags & bit) > 0

    def rows(what: str, wrong: NDArray[np.bool_]) -> Check:
        first = (
            f"{counted(int(wrong.sum()), 'row')}, the first {int(wrong.argmax())} ({table.names[int(wrong.argmax())]})"
        )
        return _check(what, bool(wrong.any()), first)

    names = np.asarray([a != b for a, b in zip(table.names, file.names, strict=True)], np.bool_)
    checks = [
        rows("ids", names),
        rows("lengths", table.lengths != file.lengths),
        rows("statuses and reasons", ~right | (file.status > store.SKIPPED)),
        *(
            ()
            if _cut_unknown(settings)
            else [rows("truncated", flag(store.TRUNCATED) != (kept & long & (settings["long"] == "truncate")))]
        ),
        rows("windowed", flag(store.WINDOWED) != (kept & long & (settings["long"] == "window"))),
        rows("replaced", (flag(store.REPLACED) != (table.replaced > 0)) | (file.replaced != table.replaced)),
        rows("copied", flag(store.COPIED) != (representative != np.arange(n))),
        rows("flags", (file.flags & ~np.uint16(KNOWN_FLAGS)) > 0),
        *stored(file, settings, representative),
    ]
    if any_by_residue(settings["pool"], settings.get("emit", ())):
        sizes = np.diff(file.residue_offsets)
        wrong = sizes > embedded if _cut_unknown(settings) else sizes != embedded
        if "imported" in settings:  # what was not there has no rows
            wrong &= file.status == store.DONE
        checks.append(rows("residue/offsets", wrong))
    return checks


def stored(file: store.EmbeddingFile, settings: dict[str, Any], representative: NDArray[np.int64]) -> list[Check]:
    """All stored numbers once: finite where a row is done, NaN where it is skipped, and copies like their originals."""
    wrong = unlike = 0
    copies = np.flatnonzero((representative != np.arange(len(file))) & (file.status == store.DONE))
    for kind, layers in (*((kind, settings["layers"]) for kind in settings["pool"]), *_logits(settings)):
        offsets = file.residue_offsets if by_residue(kind, layers[0]) else np.arange(len(file) + 1)
        for layer in layers:
            data = file.dataset(kind, layer)
            for block in store.blocks(data.shape[0]):
                rows = data[block]
                owner = np.searchsorted(offsets, np.arange(block.start, block.stop), side="right") - 1
                status = file.status[owner]
                wrong += int((~np.isfinite(rows).all(axis=1) & (status == store.DONE)).sum())
                wrong += int((~np.isnan(rows).all(axis=1) & (status == store.SKIPPED)).sum())
            if not by_residue(kind, layer):
                for block in store.blocks(len(copies)):
                    originals, back = np.unique(representative[copies[block]], return_inverse=True)
                    unlike += int((data[copies[block]] != data[originals][back]).any(axis=1).sum())
    for name in set(unmasked(settings.get("emit", ()))) - {"logits"}:
        score = file.dataset("unmasked", name)[:]
        wrong += int((~np.isfinite(score) & (file.status == store.DONE)).sum())
        wrong += int((~np.isnan(score) & (file.status == store.SKIPPED)).sum())
        unlike += int((score[copies] != score[representative[copies]]).sum())
    if (maps := file.contact_maps) is not None:
        of_maps = np.flatnonzero(maps.starts >= 0)
        _, first = np.unique(maps.starts[of_maps], return_index=True)
        settled = (maps.status != store.PENDING) | file.complete  # one that is left out is NaN
        for row in (row for row in of_maps[first].tolist() if settled[row]):
            values, is_done = maps.raw(row), maps.status[row] == store.DONE
            wrong += int(
                not (np.isfinite(values).all() and (values == values.T).all())
                if is_done
                else not np.isnan(values).all()
            )
    return [
        _check("done rows finite, skipped rows NaN", wrong, f"{wrong:,} are not"),
        _check("copies equal their originals", unlike, f"{unlike:,} do not"),
    ]


def _logits(settings: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [("unmasked", ["logits"])] if "logits" in settings.get("emit", ()) else []


def _sampled(
    file: store.EmbeddingFile, table: _Table, settings: dict[str, Any], config: ValidateConfig, verdict: Verdict
) -> NDArray[np.int64]:
    """Rows to compare: a stratified sample of what is done, and the first few that were given up as not finite."""
    piece = table.lengths if settings["long"] == "full" else np.minimum(table.lengths, settings["max_residues"])
    longest = min(oracle.LONGEST, settings["max_residues"]) if _cut_unknown(settings) else oracle.LONGEST
    why = "they may have been cut" if _cut_unknown(settings) else "eager attention does not fit"
    fits = (piece <= longest) & (table.lengths > 0)
    done = (file.status == store.DONE) & (table.lengths > 0)
    if left_out := int((done & ~fits).sum()):
        verdict.notes.append(f"{counted(left_out, 'protein')} of more than {longest:,} residues not compared: {why}")
    overflowed = np.flatnonzero(fits & (file.status == store.SKIPPED) & (file.reason == store.NOT_FINITE))
    if len(overflowed):
        verdict.notes.append(
            f"{counted(len(overflowed), 'row')} NaN, since the run found them not finite; the first are checked"
        )
    able = np.flatnonzero(done & fits)
    if not len(able):
        return able
    chosen = able[oracle.stratified(table.lengths[able], table.odd[able], config.sample, config.seed)]
    return np.sort(np.append(chosen, overflowed[:NOT_FINITE_CHECKED]))


def _of_the_values(
    file: store.EmbeddingFile, table: _Table, paths: tuple[str, ...], rows: NDArray[np.int64],
    settings: dict[str, Any], judge: Reference, config: ValidateConfig, records: list[dict[str, Any]],
) -> list[Check]:  # fmt: skip
    known = {str(dtype).removeprefix("torch."): short for short, dtype in devices.DTYPES.items()}
    compute = known.get(settings["dtype"], "fp16")  # of another tool's file, where it is not known
    min_cosine = gates.MIN_COSINE[compute] if config.min_cosine is None else config.min_cosine
    limit = config.max_rel_l2 or gates.MAX_REL_L2[compute] + (STORED_FP16 if settings["store_dtype"] == "fp16" else 0)
    compared: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    wanted = set(rows.tolist())
    every = (record for path in paths for record in plain_reader.records(path))
    for row, (_, text) in enumerate(every):
        if row not in wanted:
            continue
        mine: dict[str, Any] = {"row": row, "name": table.names[row], "residues": int(table.lengths[row])}
        for layer, expected in _expected(
            plain_reader.clean(text, settings.get("gaps", "keep"))[0], settings["layers"], settings, judge
        ).items():
            for kind in settings["pool"]:
                found = file.residues(row, layer) if kind == "residue" else file.dataset(kind, layer)[row]
                a, b = np.asarray(found, np.float64), expected[kind]
                if file.status[row] == store.SKIPPED and not np.isfinite(b).all():
                    continue  # rightly given up
                error, cosine = float("inf"), -1.0
                if a.shape == b.shape and np.isfinite(a).all():
                    error = float(agreement.relative_l2(a.ravel(), b.ravel()))
                    cosine = float(agreement.cosine(a.ravel(), b.ravel()))
                compared.setdefault((kind, layer), []).append((error, cosine, table.names[row]))
                mine |= {f"{kind}/{layer} relative L2": error, f"{kind}/{layer} cosine": cosine}
        records.append(mine)
    checks = []
    for (kind, layer), each in compared.items():
        gate = limit * (2 if kind == "residue" else 1)
        error, _, name = max(each)
        errors, cosines = [one[0] for one in each], [one[1] for one in each]
        checks.append(Check(
            VALUES, f"{kind}, layer {layer}: relative L2", error <= gate, float(np.median(errors)), worst=error,
            record=name, limit=f"{gate:.1e}",
        ))  # fmt: skip
        if kind != "residue":
            _, cosine, name = min(each, key=lambda one: one[1])
            checks.append(Check(
                VALUES, f"{kind}, layer {layer}: cosine", cosine >= min_cosine, float(np.median(cosines)), worst=cosine,
                record=name, limit=f">= {min_cosine}",
            ))  # fmt: skip
    return checks


def _cut_unknown(settings: dict[str, Any]) -> bool:
    """Whether it is an imported file that does not say what became of long proteins."""
    return "long" in settings.get("unknown", ())


def _expected(
    text: str, layers: list[int], settings: dict[str, Any], judge: Reference
) -> dict[int, dict[str, NDArray[Any]]]:
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
    found: dict[int, dict[str, NDArray[Any]]] = {
        layer: {"residue": np.zeros((whole, judge.spec.hidden)), "bos": np.zeros(judge.spec.hidden)} for layer in layers
    }
    for start, weight in zip(starts, weights, strict=True):
        piece = [reference.encode("")[0], *ids[start : start + window], reference.encode("")[-1]]
        resolved = {judge.spec.layers if layer == -1 else layer: layer for layer in layers}  # -1: an import's
        for number, hidden in judge.embed(piece, list(resolved)).items():
            layer, rows = resolved[number], hidden.double().cpu().numpy()
            found[layer]["residue"][start : start + window] += rows[1:-1] * weight[:, None]
            found[layer]["bos"] += rows[0] * (weight.sum() / whole)
            found[layer]["eos"] = rows[-1]
    for layer in layers:
        found[layer] |= oracle.pooled(found[layer]["residue"])
    return found
