"""What a run says of itself: warnings, and the numbers of its report."""

import platform
import resource
import shlex
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import fasta, report, store, tables
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed.recipe import Recipe
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan
from virnucpro_cli.plan.policies import Decisions, Int64

SIXTEEN_BIT = {320: 2.2e14, 480: 2.8e14, 640: 3.6e14, 1280: 4.9e14, 2560: 5.6e14}
MEASURED_FLOPS = {
    ("H100", "fp16"): SIXTEEN_BIT,
    ("H100", "bf16"): SIXTEEN_BIT,
    ("H100", "fp8"): {640: 4.4e14, 1280: 7.3e14, 2560: 9.4e14},
    ("H100", "fp32"): {320: 2.0e13},
    ("CPU thread", "fp32"): {320: 4.5e10},
}
"""FLOP/s that forwards reached by hidden width, for the estimate of --dry-run: virnucpro bench on one
H100 80GB (torch 2.11, UniProt lengths) and on two threads of an AVX-512 server CPU (torch 2.13)."""

MORE = 1.25

SHOWN = 3
"""Proteins that a message names, at most."""

APPROXIMATE = (
    "fp8 is approximate: on real 8M weights a protein's mean is off by 4 % (median; the worst of 128 by 26 %), forty times what "
    "rounding in fp16 does. Check what your own downstream task makes of it."
)


def of(recipe: Recipe, clock: report.Clock) -> report.RunReport:
    """The report as far as it is known before anything is computed."""
    config, table, work, computing, layout = recipe.config, recipe.table, recipe.work, recipe.computing, recipe.layout
    summary = report.RunReport(
        "embed", notes=[*_warnings(table, work, config), *computing.notes, *computing.device.notes]
    )
    if computing.dtype == torch.float8_e4m3fn:
        summary.notes.append(APPROXIMATE)
    if recipe.shard is not None:
        summary.notes.insert(
            0, f"shard {recipe.shard}: {counted(len(table), 'protein')} of the input, into {recipe.output}"
        )
    summary.notes += [note for each in recipe.features if (note := each.note(layout, recipe.spec))]
    unknown = [
        f"{told}: {count:,}" for told, count in layout.extra.counts.items() if count and told.startswith("names of")
    ]
    summary.notes.extend(unknown)
    summary.counts = _counts(table, work) | layout.extra.counts
    summary.packing = _packing(recipe.plan, work)
    summary.environment = _environment(recipe)
    summary.memory = free_memory(computing.device)
    summary.seconds = clock.seconds
    return summary


def free_memory(device: devices.Device) -> dict[str, int]:
    """Bytes that this run may take of its device and its host, as far as anybody says."""
    free = {"free device memory": device.free, "free host memory": devices.free_memory(torch.device("cpu"))}
    return {name: int(size) for name, size in free.items() if np.isfinite(size)}


def has_more_memory(there: dict[str, int], here: dict[str, int]) -> bool:
    """Whether one of them is larger here by more than a machine's free memory usually changes."""
    return any(size > MORE * there[name] for name, size in here.items() if name in there)


GAPS = {
    "keep": "embedded as tokens, as fair-esm does; --gaps strip leaves them out",
    "strip": "left out",
    "x": "embedded as X",
}


def _warnings(table: fasta.RecordTable, work: Decisions, config: EmbedConfig) -> list[str]:
    n = len(table)
    notes = []
    truncated = (work.flags & store.TRUNCATED) > 0
    if truncated.any():
        unseen = int((table.length[truncated] - work.embedded[truncated]).sum(dtype=np.int64)) / max(table.residues, 1)
        notes.append(
            f"{int(truncated.sum()):,} of {counted(n, 'protein')} truncated, {_percent(unseen)} of residues not seen; --long window embeds them whole"
        )
    replaced = int((table.replaced > 0).sum())
    if replaced and config.invalid == "x":
        odd = int(table.replaced.sum(dtype=np.int64))
        notes.append(
            f"{replaced:,} of {counted(n, 'protein')} with {counted(odd, 'residue')} outside the alphabet, embedded as X (column /replaced): "
            + named(table, table.replaced > 0, config)
        )
    gapped = int((table.gaps > 0).sum())
    if gapped:
        letters, how = int(table.gaps.sum(dtype=np.int64)), GAPS[config.gaps]
        notes.append(
            f"{gapped:,} of {counted(n, 'protein')} with gaps, {counted(letters, 'letter')} - or ., {how} (column /gaps)"
        )
    for code in (store.EMPTY, store.INVALID, store.TOO_LONG):
        skipped = work.reason == code
        if skipped.any():
            told = (
                f"{int(skipped.sum()):,} of {counted(n, 'protein')} skipped, their rows are NaN: {store.REASONS[code]}"
            )
            notes.append(f"{told}: {named(table, skipped, config)}")
    if config.pool == ("residue",):
        notes.append(
            "only per-residue rows are stored, so the file has no /embeddings; add mean, say, to --pool for one row a protein"
        )
    repeated = _repeated_names(table, config) if config.shard is None else 0
    if repeated:
        notes.append(
            f"{counted(repeated, 'protein')} {'shares its' if repeated == 1 else 'share their'} name with an earlier one; all are kept, one row each, in input order"
        )
    return notes


def named(table: fasta.RecordTable, chosen: NDArray[np.bool_], config: EmbedConfig) -> str:
    """Names of the first of the chosen records, and how many more there are. chosen: mask [N]."""
    records = np.flatnonzero(chosen)
    names = [table.names(i, i + 1, config.id == "full")[0] for i in records[:SHOWN].tolist()]
    more = [f"and {len(records) - SHOWN:,} more"] if len(records) > SHOWN else []
    shown = [tables.cell(name) or f"record {i + 1:,}" for i, name in zip(records.tolist(), names, strict=False)]
    return ", ".join([*shown, *more])


def ending(recipe: Recipe, summary: report.RunReport, clock: report.Clock) -> list[str]:
    """Lines that a finished run ends with: proteins, truncated, time, file, next.

    A hidden file is another command's, which speaks of it.
    """
    counts, output, table, config = summary.counts, recipe.output, recipe.table, recipe.config
    with store.read_embeddings(output) as file:
        skipped, reason = file.status == store.SKIPPED, file.reason[:]
    done = f"{len(table) - int(skipped.sum()):,} of {counted(len(table), 'protein')} embedded"
    why = {store.REASONS[code] for code in np.unique(reason[skipped]).tolist()}
    left = f"; skipped: {named(table, skipped, config)} ({', '.join(sorted(why))})" if skipped.any() else ""
    more = [f"{told}: {n:,}" for told, n in recipe.layout.extra.counts.items() if n and not told.startswith("names of")]
    cut = counts["truncated"]
    rate = f", {summary.rates['tokens/s']:,.0f} tokens/s in the model" if summary.rates else ""
    device, dtype = (str(summary.environment[name]).removesuffix(" (auto)") for name in ("device", "dtype"))
    file_name = shlex.quote(str(output))
    to_do = f"virnucpro inspect {file_name}"
    if recipe.shard is not None:
        to_do = f"virnucpro status {shlex.quote(config.output)}"
    elif (reason[skipped] == store.NO_MEMORY).any():
        to_do = "the same command with --retry-skipped, where there is more memory"
    lines = [
        f"proteins   {'; '.join([done + left, *more])}",
        f"truncated  {cut:,}" + ("; --long window embeds them whole" if cut else ""),
        f"time       {report.clock_time(clock.so_far())}{rate} ({device}, in {dtype})",
    ]
    hidden = output.name.startswith(".")
    return (
        lines
        if hidden
        else [*lines, f"file       {output}, {report.size(output.stat().st_size)}", f"next       {to_do}"]
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _repeated_names(table: fasta.RecordTable, config: EmbedConfig) -> int:
    """How many records have the name of an earlier one."""
    hashes = np.empty(len(table), np.int64)
    for rows in store.blocks(len(table)):
        hashes[rows] = [hash(name) for name in table.names(rows.start, rows.stop, config.id == "full")]
    return len(table) - len(np.unique(hashes))


def _counts(table: fasta.RecordTable, work: Decisions) -> dict[str, int]:
    def flagged(bit: int) -> int:
        return int(((work.flags & bit) > 0).sum())

    return {
        "proteins": len(table),
        "distinct proteins": len(np.unique(work.segments.record)),
        "residues": table.residues,
        "tokens": int(work.segments.length.sum(dtype=np.int64)) + SPECIAL_TOKENS * len(work.segments),
        "truncated": flagged(store.TRUNCATED),
        "windowed": flagged(store.WINDOWED),
        "with replaced residues": int((table.replaced > 0).sum()),
        "with gaps": int((table.gaps > 0).sum()),
        "copied from an identical one": flagged(store.COPIED),
        "tokens saved by copying": int(
            (work.embedded.astype(np.int64) + SPECIAL_TOKENS)[(work.flags & store.COPIED) > 0].sum()
        ),
        "skipped": int((work.status == store.SKIPPED).sum()),
    }


def _packing(plan: Plan, work: Decisions) -> dict[str, float]:
    return {
        "packs": len(plan),
        "token budget": plan.token_budget,
        "density": plan.density,
        "density without the last pack": plan.density_without_last,
        "segments per pack": len(work.segments) / max(len(plan), 1),
        "filler tokens": int(plan.bucket.sum() - plan.tokens.sum()),
    }


def _environment(recipe: Recipe) -> dict[str, Any]:
    config, spec, computing = recipe.config, recipe.spec, recipe.computing
    device, several = computing.device, len(computing.devices) > 1 or config.engine == "ray"

    def chosen(value: str, asked: Any) -> str:
        return f"{value} (auto)" if asked == "auto" else value

    return {
        "virnucpro": virnucpro_cli.__version__,
        "torch": device.torch,
        "python": platform.python_version(),
        "model": f"{spec.name} ({spec.size})",
        "device": chosen(device.name, config.device),
        **({"workers": chosen(computing.described(), config.workers)} if several else {}),
        "dtype": chosen(devices.describe_dtype(computing.dtype), config.dtype),
        "attention": chosen(device.attention, config.attention),
        "token budget": chosen(f"{recipe.plan.token_budget:,}", config.token_budget),
    }


def fill_rates(
    summary: report.RunReport, recipe: Recipe, packs: Int64, clock: report.Clock, placer: Placer, file: store.Store
) -> None:
    """Add what is known at the end. packs: those that were computed."""
    plan = recipe.plan
    seconds = dict(clock.seconds)
    if placer.first_pack is not None:
        seconds["first pack"] = placer.first_pack
    order = (
        "genes",
        "index",
        "plan",
        "cache",
        "load model",
        "start workers",
        "first pack",
        "forward",
        "write",
        "write (overlapped)",
        "contacts",
    )
    summary.seconds = {name: seconds[name] for name in order if name in seconds}
    forward = seconds.get("forward", 0.0)
    if forward > 0:
        tokens = int(plan.tokens[packs].sum())
        segments = int(sum(plan.offsets[p + 1] - plan.offsets[p] for p in packs.tolist()))
        summary.rates = {
            "residues/s": (tokens - SPECIAL_TOKENS * segments) / forward,
            "tokens/s": tokens / forward,
            "segments/s": segments / forward,
        }
    summary.memory["peak host memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if recipe.computing.local_device.type == "cuda":
        summary.memory["peak GPU memory"] = torch.cuda.max_memory_allocated(recipe.computing.local_device)
    if len(file.environments) > 1:
        summary.tables["Computed by"] = report.where_computed(
            file.environments, file.computed_by, file.status == store.DONE
        )
    summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
    summary.missed += summary.counts["skipped"]
    summary.counts["recomputed in fp32"] = int(((file.flags & store.RECOMPUTED) > 0).sum())


def describe_plan(summary: report.RunReport, recipe: Recipe, out: Console) -> None:
    """What a dry run prints, and adds to the report."""
    table, work, plan, layout, spec = recipe.table, recipe.work, recipe.plan, recipe.layout, recipe.spec
    device, found = recipe.computing.device, recipe.found
    length = work.segments.length.astype(np.float64) + SPECIAL_TOKENS
    flops = spec.flops(float(plan.bucket.sum()), float((length**2).sum()), max(recipe.layers))
    kind, count = ("CPU thread", torch.get_num_threads())
    if "H100" in device.name:
        kind, count = "H100", recipe.computing.gpus
    name = devices.short_name(recipe.computing.dtype)
    by_width = MEASURED_FLOPS.get((kind, name), {}) if kind == "H100" or device.kind == "cpu" else {}
    rate = max((rate for width, rate in by_width.items() if width <= spec.hidden), default=None)
    summary.counts["output bytes (estimate)"] = layout.file_bytes
    summary.environment["weights"] = found.place if found else "not on this machine; the run will fetch them"
    edges = [0, 50, 100, 200, 400, 800, 1023, 2000, 5000]
    bins = np.append(edges, np.iinfo(np.int32).max)
    labels = [f"{a}-{b - 1}" for a, b in pairwise(edges)] + [f"{edges[-1]} and more"]
    histogram = np.histogram(table.length, bins)[0].tolist()
    summary.environment["length histogram"] = dict(zip(labels, histogram, strict=True))
    out.print(report.packing_table(summary))
    out.print(
        "lengths:  "
        + ";  ".join(f"{label}: {n:,}" for label, n in summary.environment["length histogram"].items() if n)
    )
    for key in ("model", "weights", "device", "workers", "dtype", "attention", "token budget"):
        if key in summary.environment:
            out.print(f"{key}: {summary.environment[key]}")
    free = store.free_space(recipe.output)
    enough = "" if free >= layout.file_bytes else ", WHICH IS NOT ENOUGH"
    out.print(f"output: at most {report.size(layout.file_bytes)}; {report.size(free)} are free there{enough}")
    if rate:
        summary.seconds["forward (estimate)"] = flops / (rate * count)
        out.print(
            f"time: about {report.clock_time(flops / (rate * count))} of forward, an estimate from FLOPs and a measured rate"
        )
    else:
        out.print(f"time: no measured rate for {device.name} in {name}, so no estimate")
