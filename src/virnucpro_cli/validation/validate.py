"""The validate workflow: a sample of proteins through `embed` itself and through the oracle, and a verdict.

Three parts. Semantics: the fast path in fp32 is the oracle. Precision: the run's own dtype is as near to that as the
oracle is in the same dtype. Packing: a protein's bits do not depend on its neighbours. Then the range of each layer.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import embed, report, scratch
from virnucpro_cli.config import EmbedConfig, ValidateConfig, resolve
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange import importing, layouts
from virnucpro_cli.fasta.plain import refuse_unreadable, write_texts
from virnucpro_cli.fasta.tokenised import tokenised
from virnucpro_cli.kinds import KINDS, NUCLEOTIDE, PROTEIN, WORDS
from virnucpro_cli.model import adapters, locate
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import build, family_of, reading
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import stream_dtype
from virnucpro_cli.stopping import resumable
from virnucpro_cli.store import RECOMPUTED, fingerprint_of, read_embeddings
from virnucpro_cli.validation import audit, gates, invariance, largest, oracle, oracle_of, plain_reader
from virnucpro_cli.validation.oracle import Oracle, Rows, Sample
from virnucpro_cli.validation.verdict import Verdict

DEFAULT_MODEL = "demo"
SHIPPED = {PROTEIN: ("viral_proteins.fasta", "edge_cases.fasta"), NUCLEOTIDE: ("nucleotides.fasta",)}


def run(config: ValidateConfig, out: Console | None = None) -> Verdict:
    """Do what `virnucpro validate` does and return the verdict. Raises UserError for what the user can put right."""
    out = out or report.console(config.quiet)
    read = [*config.fasta, *([config.against] if config.against else [])]
    read += map(str, locate.files_read(config.model or DEFAULT_MODEL, config.adapter))
    report.check_places({"report": config.report}, read)
    clock = report.Clock()
    exact_arithmetic()
    verdict = _audit(config, config.against, out, clock) if config.against else _validate(config, out, clock)
    verdict.seconds = clock.seconds
    for key, value in verdict.environment.items():
        out.print(f"{key}: {value}")
    verdict.show(out, config.report)
    return verdict


def validate_model(**options: Any) -> Verdict:
    """Validate from Python; options: the fields of `ValidateConfig`, e.g. `model="650M", fasta="my.fasta"`."""
    with devices.as_before():
        return run(resolve(ValidateConfig, None, {"quiet": True, **options}))


def _audit(config: ValidateConfig, path: str, out: Console, clock: report.Clock) -> Verdict:
    """Audit a file of ours as it is, and one of another tool as it would be imported."""
    if fingerprint_of(Path(path)) is not None or layouts.guessed(Path(path)) is None:
        return audit.audit_file(config, out, clock)
    if not config.fasta or not config.model:
        raise UserError(
            f"{path} is of another tool, and does not say what it was made from.",
            "Say both: --fasta FILE --model NAME.",
        )
    with scratch.folder() as folder:
        copy, quiet = str(Path(folder) / "imported.h5"), report.console(quiet=True)
        with clock.stage("import"):
            imported = importing.import_file(path, copy, inputs=config.fasta, model=config.model, out=quiet)
        verdict = audit.audit_file(replace(config, against=copy), out, clock)
    verdict.environment["file"] = path
    verdict.notes += imported.notes
    return verdict


@dataclass(frozen=True)
class _Subject:
    """A sample of proteins and the model that is to embed it, in the fast path and as the oracle."""

    config: ValidateConfig
    out: Console
    clock: report.Clock
    loaded: embed.Loaded
    family: type[Oracle]
    layers: tuple[int, ...]
    sample: Sample
    notes: list[str]
    again: set[int] = field(default_factory=set)
    """Proteins that were computed again in fp32."""

    def say(self, what: str, how: str) -> None:
        self.out.print(f"{what}: {counted(len(self.sample), WORDS[self.config.kind][0])} in {how}", style="dim")

    def judge(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Oracle:
        spec, state, _ = self.loaded
        return self.family(spec, state, device, dtype)

    def oracle_rows(self, device: torch.device, dtype: torch.dtype, together: int = 1) -> Rows:
        """The oracle's rows of every kind and layer, float32 [n, D], for residue [sum of lengths, D]."""
        how = f"{attention_backends.describe(dtype)} on {device.type}"
        self.say("reference", how)
        with self.clock.stage(f"reference, {how}"):
            return oracle.rows_of(self.judge(device, dtype), self.sample, self.layers, together)

    def exact_and_plain(self, truth: Rows, dtype: torch.dtype, device: torch.device) -> tuple[Rows, list[Rows]]:
        """Rows that stand for the exact ones, and those whose errors are the noise floor of the dtype.

        truth: the oracle's rows in fp32, float32 [n, D] of each kind and layer, for residue [sum of lengths, D].
        """
        if dtype != torch.float32:
            return truth, [self.oracle_rows(device, stream_dtype(dtype))]
        reference_device = devices.resolve_device(self.config.reference_device, "--reference-device")
        plain = [truth] if device == reference_device else [truth, self.oracle_rows(device, dtype)]
        if device.type == "cuda":  # fp32 GEMMs of few rows run on other, more exact kernels there
            plain.append(self.oracle_rows(device, dtype, together=8))
        return self.oracle_rows(reference_device, torch.float64), plain

    def embedded(self, path: Path, dtype: str) -> Rows:
        """Rows that `embed` computes of the sample in a dtype, float32 [n, D], for residue [sum of lengths, D]."""
        config, attention = self.config, self.config.attention
        if dtype == "fp32":  # a backend named for the run's own dtype may not know fp32
            try:
                attention_backends.resolve(attention, devices.resolve_device(config.device), torch.float32)
            except UserError:
                attention = "auto"
        output = path.with_name(f"{dtype}.h5")
        settings = EmbedConfig(
            inputs=(str(path),), output=str(output), model=config.model or DEFAULT_MODEL, layers=self.layers,
            pool=KINDS, dtype=dtype, store_dtype="fp32", device=config.device, attention=attention,
            token_budget=config.token_budget, max_residues=config.max_residues, long="truncate", quiet=True,
            force_protein=config.kind == PROTEIN, kind=config.kind, adapter=config.adapter, residual=config.residual,
        )  # fmt: skip
        with self.clock.stage(f"embed, {dtype}"), resumable(False):  # what it keeps is in a temporary folder
            embed.run(settings, loaded=self.loaded)
        with read_embeddings(output) as file:
            self.again.update(np.flatnonzero(file.flags & RECOMPUTED).tolist())
            if self.again:
                again = counted(len(self.again), file.words[0])
                self.notes.append(f"{again} recomputed in fp32, after an overflow in {dtype}")
            rows: Rows = {(kind, layer): file.dataset(kind, layer)[:] for kind in KINDS for layer in self.layers}
        os.unlink(output)
        return rows


def _validate(config: ValidateConfig, out: Console, clock: report.Clock) -> Verdict:
    device = devices.resolve_device(config.device)
    dtype = devices.resolve_dtype(config.dtype, device)
    backend = attention_backends.resolve(config.attention, device, dtype, config.residual)
    reference_device = devices.resolve_device(config.reference_device, "--reference-device")
    found = locate.fetch(config.model or DEFAULT_MODEL, lambda text: out.print(text))
    weights = locate.verified(adapters.with_adapters(found, config.adapter))
    with clock.stage("load model"):
        loaded = model_weights.load(weights)
    spec, state, notes = loaded
    layers = embed.resolved_layers(config.layers or (0, spec.layers // 2, spec.layers), spec)
    if family_of(spec).READING is None:
        config = replace(config, kind=NUCLEOTIDE)
    path = locate.tokenizer_of(weights, spec)
    how, family = reading(spec, config.kind), oracle_of(spec, config.kind, path)
    with clock.stage("sample"):
        sample, left_out = choose(config.fasta or shipped(config.kind), config, family)
    verdict = Verdict("validate", notes=[*notes, *backend.notes, *left_out])
    word, letter = WORDS[config.kind]
    residues = counted(int(sample.lengths.sum()), letter)
    verdict.environment = {
        "python": platform.python_version(),
        "model": f"{weights.name} ({spec.size})",
        **({"kind": config.kind} if config.kind != PROTEIN else {}),
        "device": devices.describe_device(device),
        "dtype": devices.describe_dtype(dtype),
        "attention": backend.name,
        **family.environment(weights, reference_device),
        "sample": f"{counted(len(sample), word)}, {residues}, seed {config.seed}",
        "inputs": list(config.fasta) or f"the {word}s that ship with virnucpro",
        "layers": list(layers),
    }
    subject = _Subject(config, out, clock, loaded, family, layers, sample, verdict.notes)
    with scratch.folder() as folder:
        tokens = None if family_of(spec).TOKENIZER is None else partial(tokenised, path=path, folder=Path(folder))
        path = write_texts(Path(folder) / "sample.fasta", sample.texts)
        kinds = dict.fromkeys((torch.float32, dtype))
        subject.say("embed", f"{' and '.join(map(attention_backends.describe, kinds))} on {device.type}")
        fast32 = subject.embedded(path, "fp32")
        own = fast32 if dtype == torch.float32 else subject.embedded(path, config.dtype)
        truth = subject.oracle_rows(reference_device, torch.float32)
        verdict.checks += gates.semantics(fast32, truth, sample, layers)
        precision = gates.Precision(dtype, own, *subject.exact_and_plain(truth, dtype, device), sample, layers)
        verdict.checks += precision.checks(config)
        verdict.records = precision.records()
        verdict.notes += [precision.note] if precision.overflows else []
        del precision
        with clock.stage("packing"):
            out.print(f"packing: the same {word}s alone, in one pack, among strangers", style="dim")
            model = build(spec, state, dtype, device, backend)
            verdict.checks += invariance.packing(model, path, own, sample, layers, config, subject.again, tokens)
            verdict.checks += invariance.padded(subject.judge(reference_device), own, truth, sample, layers)
        with clock.stage("range"):
            values = largest.by_layer(model, path, sample.lengths, how, tokens)
            verdict.largest = values.tolist()
            verdict.checks += largest.checks(values, model.embedding.dtype)
    return verdict


def shipped(kind: str = PROTEIN) -> tuple[str, ...]:
    """FASTA files of a kind that come with the package."""
    folder = Path(virnucpro_cli.__file__).parent / "data"
    return tuple(str(folder / name) for name in SHIPPED[kind])


def choose(paths: Sequence[str], config: ValidateConfig, family: type[Oracle]) -> tuple[Sample, list[str]]:
    """A length-stratified sample of the records of FASTA files by the plain reader, and notes on what is left out.

    Raises UserError if a file cannot be read, or if there are not two proteins.
    """
    refuse_unreadable(paths)
    table = plain_reader.read(paths, letters=family.letters)
    embedded = np.minimum(table.lengths, config.max_residues)
    fit = np.flatnonzero((embedded > 0) & (embedded <= oracle.LONGEST))
    if len(fit) < 2:
        raise UserError("There are not two proteins to validate with.", "Give a FASTA file with more proteins.")
    notes = []
    if count := int((embedded > oracle.LONGEST).sum()):
        word, letter = WORDS[config.kind]
        longer = f"{counted(count, word)} of more than {oracle.LONGEST:,} {letter}s"
        notes.append(f"{longer} left out: eager attention does not fit")
    chosen = set(fit[oracle.stratified(embedded[fit], table.odd[fit], config.sample, config.seed)].tolist())
    names, texts, tokens = [], [], []
    every = (record for path in paths for record in plain_reader.records(path))
    for number, (header, text) in enumerate(every):
        if number in chosen:
            names.append(plain_reader.name_of(header) or f"record {number + 1}")
            texts.append(text)
            tokens.append(family.encode(plain_reader.clean(text, letters=family.letters)[0], config.max_residues))
    return Sample(names, texts, tokens), notes
