"""The validate workflow: a sample of proteins through `embed` itself and through the reference, and a verdict.

Three parts. Semantics: the fast path in fp32 is fair-esm. Precision: the run's own dtype is as near to that as the
reference is in the same dtype. Packing: a protein's bits do not depend on its neighbours.
"""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import embed, fasta, report, scratch
from virnucpro_cli.config import EmbedConfig, ValidateConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import Stopped, UserError, counted
from virnucpro_cli.exchange import importing, layouts
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import stream_dtype
from virnucpro_cli.store import RECOMPUTED, fingerprint_of, read_embeddings
from virnucpro_cli.validation import audit, gates, invariance, oracle, plain_reader, reference
from virnucpro_cli.validation.oracle import Rows, Sample
from virnucpro_cli.validation.reference import Reference
from virnucpro_cli.validation.verdict import Verdict

DEFAULT_MODEL = "demo"
SHIPPED = ("viral_proteins.fasta", "edge_cases.fasta")


def run(config: ValidateConfig, out: Console | None = None) -> Verdict:
    """Do what `virnucpro validate` does and return the verdict. Raises UserError for what the user can put right."""
    out = out or report.console(config.quiet)
    read = [*config.fasta, *([config.against] if config.against else [])]
    read += map(str, locate.files_read(config.model or DEFAULT_MODEL))
    report.check_places({"report": config.report}, read)
    clock = report.Clock()
    exact_arithmetic()
    verdict = _audit(config, config.against, out, clock) if config.against else _validate(config, out, clock)
    verdict.seconds = clock.seconds
    for key, value in verdict.environment.items():
        out.print(f"{key}: {value}")
    out.print(verdict.table())
    for note in verdict.notes:
        out.print(note, style="yellow")
    if config.report:
        report.save(config.report, verdict.to_json())
    return verdict


def _audit(config: ValidateConfig, path: str, out: Console, clock: report.Clock) -> Verdict:
    """Of a file of ours as it is; of another tool's, of what becomes of it when it is imported."""
    if fingerprint_of(Path(path)) is not None or layouts.guessed(Path(path)) is None:
        return audit.audit_file(config, out, clock)
    if not config.fasta or not config.model:
        raise UserError(
            f"{path} is of another tool, and does not say what it was made from.",
            "Say both: --fasta FILE --model NAME.",
        )
    with scratch.folder() as folder:
        copy = str(Path(folder) / "imported.h5")
        with clock.stage("import"):
            imported = importing.import_file(
                path, copy, inputs=config.fasta, model=config.model, out=report.console(quiet=True)
            )
        verdict = audit.audit_file(replace(config, against=copy), out, clock)
    verdict.environment["file"] = path
    verdict.notes += imported.notes
    return verdict


def validate_model(**options: Any) -> Verdict:
    """Validate from Python; options: the fields of `ValidateConfig`, e.g. `model="650M", fasta="my.fasta"`."""
    with devices.as_before():
        return run(resolve(ValidateConfig, None, {"quiet": True, **options}))


def _validate(config: ValidateConfig, out: Console, clock: report.Clock) -> Verdict:
    device = devices.resolve_device(config.device)
    dtype = devices.resolve_dtype(config.dtype, device)
    backend = attention_backends.resolve(config.attention, device, dtype)
    reference_device = devices.resolve_device(config.reference_device, "--reference-device")
    found = locate.verified(locate.fetch(config.model or DEFAULT_MODEL, lambda text: out.print(text)))
    with clock.stage("load model"):
        spec, state, notes = model_weights.load(found)
    layers = embed.resolved_layers(config.layers or (0, spec.layers // 2, spec.layers), spec)
    with clock.stage("sample"):
        paths = config.fasta or shipped()
        fasta.refuse_unreadable(paths)
        sample, left_out = choose(paths, config)
    verdict = Verdict("validate", notes=[*notes, *backend.notes, *left_out])
    verdict.environment = {
        "virnucpro": virnucpro_cli.__version__,
        "torch": torch.__version__,
        "fair-esm": version("fair-esm"),
        "python": platform.python_version(),
        "model": f"{found.name} ({spec.size})",
        "weights": found.place,
        "weights_sha256": found.sha256,
        "device": devices.describe_device(device),
        "dtype": devices.describe_dtype(dtype),
        "attention": backend.name,
        "reference": reference.described(devices.describe_device(reference_device)),
        "sample": f"{counted(len(sample), 'protein')}, {counted(int(sample.lengths.sum()), 'residue')}, seed {config.seed}",
        "inputs": list(config.fasta) or "the proteins that ship with virnucpro",
        "layers": list(layers),
    }

    def reference_rows(on: torch.device, kind: torch.dtype, together: int = 1) -> Rows:
        name = attention_backends.describe(kind)
        out.print(f"reference: {counted(len(sample), 'protein')} in {name} on {on.type}", style="dim")
        with clock.stage(f"reference, {name} on {on.type}"):
            return oracle.rows_of(Reference(spec, state, on, kind), sample, layers, together)

    with scratch.folder() as folder:
        path = write_texts(Path(folder) / "sample.fasta", sample.texts)
        fast = partial(fast_rows, config, path, layers, (spec, state, notes), verdict.notes, clock)
        kinds = "float32" if dtype == torch.float32 else f"float32 and {attention_backends.describe(dtype)}"
        out.print(f"embed: {counted(len(sample), 'protein')} in {kinds} on {device.type}", style="dim")
        fast32 = fast("fp32")
        own = fast32 if dtype == torch.float32 else fast(config.dtype)
        truth = reference_rows(reference_device, torch.float32)
        verdict.checks += gates.semantics(fast32, truth, sample, layers)
        if dtype == torch.float32:
            exact = reference_rows(reference_device, torch.float64)
            plain = [truth] if device == reference_device else [truth, reference_rows(device, dtype)]
            if device.type == "cuda":  # fp32 GEMMs of few rows run on other, more exact kernels there
                plain.append(reference_rows(device, dtype, together=8))
        else:
            exact, plain = truth, [reference_rows(device, stream_dtype(dtype))]
        verdict.checks += gates.precision(own, exact, plain, sample, layers, config, dtype)
        verdict.records = gates.of_each_protein(own, exact, plain, sample, layers)
        del exact, plain
        with clock.stage("packing"):
            out.print("packing: the same proteins alone, in one pack, among strangers", style="dim")
            model = ESM2(spec, state, dtype, device, backend)
            verdict.checks += invariance.packing(model, path, own, sample, layers, config)
            verdict.checks += invariance.padded(Reference(spec, state, reference_device), own, truth, sample, layers)
    return verdict


# --- what is compared ----------------------------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    folder = Path(virnucpro_cli.__file__).parent / "data"
    return tuple(str(folder / name) for name in SHIPPED)


def choose(paths: Sequence[str], config: ValidateConfig) -> tuple[Sample, list[str]]:
    """A length-stratified sample of the records of FASTA files by the plain reader, and notes on what is left out."""
    lengths, odd = [], []
    for _, text in _every(paths):
        _, length, replaced = plain_reader.clean(text)
        lengths.append(length)
        odd.append(oracle.oddities(text, replaced))
    embedded = np.minimum(np.asarray(lengths, np.int64), config.max_residues)
    fit = np.flatnonzero((embedded > 0) & (embedded <= oracle.LONGEST))
    if len(fit) < 2:
        raise UserError("There are not two proteins to validate with.", "Give a FASTA file with more proteins.")
    notes = []
    if (embedded > oracle.LONGEST).any():
        count = int((embedded > oracle.LONGEST).sum())
        notes.append(
            f"{counted(count, 'protein')} of more than {oracle.LONGEST:,} residues left out: eager attention does not fit"
        )
    chosen = set(
        fit[oracle.stratified(embedded[fit], np.asarray(odd, np.uint16)[fit], config.sample, config.seed)].tolist()
    )
    names, texts, tokens = [], [], []
    for number, (header, text) in enumerate(_every(paths)):
        if number in chosen:
            names.append(plain_reader.name_of(header) or f"record {number + 1}")
            texts.append(text)
            tokens.append(reference.encode(plain_reader.clean(text)[0], config.max_residues))
    return Sample(names, texts, tokens), notes


def _every(paths: Iterable[str]) -> Iterable[tuple[bytes, bytes]]:
    for path in paths:
        yield from plain_reader.records(path)


def fast_rows(
    config: ValidateConfig, path: Path, layers: tuple[int, ...], loaded: embed.Loaded, notes: list[str],
    clock: report.Clock, dtype: str,
) -> Rows:  # fmt: skip
    """What `embed` stores of the sample in a dtype, in fp32."""
    attention = config.attention
    if dtype == "fp32":  # a backend named for the run's own dtype may not know fp32
        try:
            attention_backends.resolve(attention, devices.resolve_device(config.device), torch.float32)
        except UserError:
            attention = "auto"
    output = path.with_name(f"{dtype}.h5")
    settings = EmbedConfig(
        inputs=(str(path),), output=str(output), model=config.model or "demo", layers=layers, pool=KINDS, dtype=dtype,
        store_dtype="fp32", device=config.device, attention=attention, token_budget=config.token_budget,
        max_residues=config.max_residues, force_protein=True, quiet=True,
    )  # fmt: skip
    try:
        with clock.stage(f"embed, {dtype}"):
            embed.run(settings, loaded=loaded)
    except Stopped as stop:
        stop.resumable = False  # what it kept is in a temporary folder
        raise
    with read_embeddings(output) as file:
        if (file.flags & RECOMPUTED).any():
            notes.append(
                f"{counted(int(((file.flags & RECOMPUTED) > 0).sum()), 'protein')} recomputed in fp32, after an overflow in {dtype}"
            )
        rows: Rows = {(kind, layer): file.dataset(kind, layer)[:] for kind in KINDS for layer in layers}
    os.unlink(output)
    return rows
