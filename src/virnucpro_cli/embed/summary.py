"""The words of a run: warnings, and the numbers of its report."""

import platform
import resource
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import virnucpro_cli
from virnucpro_cli import fasta, report, store
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed.recipe import EmbedRun
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted, shell_word
from virnucpro_cli.kinds import OF_ALL_RESIDUES, PROTEIN
from virnucpro_cli.model import locate
from virnucpro_cli.model.families import flops
from virnucpro_cli.plan.packing import SPECIAL_TOKENS
from virnucpro_cli.plan.policies import Int64
from virnucpro_cli.stopping import threads

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

MOST_THREADS = 16
MORE = 1.25
SHOWN = 3
"""Proteins that a message names, at most."""
APPROXIMATE = (
    "fp8 is approximate: on real 8M weights a protein's mean is off by 4 % (median; the worst of 128 by 26 %), forty "
    "times what rounding in fp16 does. Check what your own downstream task makes of it."
)


def begin(run: EmbedRun) -> None:
    """Give the report what is known before anything is computed."""
    summary, computing, counts = run.summary, run.computing, run.layout.extra.counts
    shard = f"shard {run.shard}: {counted(len(run.table), run.config.words[0])} of the input, into {run.output}"
    summary.notes = [
        *([shard] if run.shard is not None else []), *_warnings(run), *computing.notes, *computing.device.notes,
        *([APPROXIMATE] if computing.dtype == torch.float8_e4m3fn else []),
        *(note for feature in run.features if (note := feature.note(run))),
        *(f"{name}: {count:,}" for name, count in counts.items() if count and name.startswith("names of")),
    ]  # fmt: skip
    summary.counts = _counts(run) | counts
    summary.packing = _packing(run)
    summary.environment = _environment(run)
    free = {"device": computing.device.free, "host": devices.free_memory(torch.device("cpu"))}
    summary.memory = {f"free {of} memory": int(size) for of, size in free.items() if np.isfinite(size)}


def note_seconds(run: EmbedRun) -> None:
    """Give the report the seconds of all stages until now."""
    run.summary.seconds = run.clock.spent() | run.clock.meanwhile
    run.summary.meanwhile = list(run.clock.meanwhile)


def has_more_memory(there: dict[str, int], here: dict[str, int]) -> bool:
    """Whether one of them is larger here by more than a machine's free memory usually changes."""
    return any(size > MORE * there[name] for name, size in here.items() if name in there)


def _warnings(run: EmbedRun) -> list[str]:
    config, table, decisions = run.config, run.table, run.decisions
    notes, (word, letter), unknown = [], config.words, table.reading.unknown

    def warn(chosen: NDArray[np.bool_], text: str, name_them: bool = False) -> None:
        """chosen: mask, bool [N]."""
        if chosen.any():
            names = f": {named(table, chosen, config)}" if name_them else ""
            notes.append(f"{int(chosen.sum()):,} of {counted(len(table), word)} {text}{names}")

    truncated = (decisions.flags & store.TRUNCATED) > 0
    sizes, unit = table.sizes, table.unit(letter)
    unseen = int((sizes[truncated] - decisions.embedded[truncated]).sum(dtype=np.int64)) / max(
        int(sizes.sum(dtype=np.int64)), 1
    )
    share = f"{unseen:.0%}" if unseen >= 0.01 else "under 1%"
    warn(truncated, f"truncated, {share} of {unit}s not seen; {_way_to_embed_whole(run)}")
    windowed = (decisions.flags & store.WINDOWED) > 0
    if run.spec.longest is not None:
        most = f"{run.spec.name} takes at most {run.spec.longest:,}"
        warn(windowed, f"embedded by windows of {counted(config.max_residues, unit)}: {most}")
    if config.invalid == "x":
        replaced = int(table.replaced.sum(dtype=np.int64))
        odd, part = counted(replaced, letter), replaced / max(table.residues, 1)
        odd += f", {part:.0%} of all," if part >= 0.05 else ""
        text = f"with {odd} outside the alphabet, embedded as {unknown} (column /replaced)"
        warn(table.replaced > 0, text, name_them=True)
    letters = counted(int(table.gaps.sum(dtype=np.int64)), "letter")
    warn(table.gaps > 0, f"with gaps, {letters} - or ., {_of_gaps(table.reading).get(config.gaps)} (column /gaps)")
    for code in (store.EMPTY, store.INVALID, store.TOO_LONG):
        warn(decisions.reason == code, f"skipped, their rows are NaN: {store.REASONS[code]}", name_them=True)
    for name in filter(fasta.lacks_end, config.inputs):
        notes.append(f"{name} lacks the block that ends a BGZF file: if it was cut short, records are missing")
    if config.pool == ("residue",):
        remedy = f"add mean, say, to --pool for one row a {word}"
        notes.append(f"only per-residue rows are stored, so the file has no /embeddings; {remedy}")
    table.let_go()
    with run.clock.stage("names"):
        repeated = _repeated_names(table, config) if config.shard is None else 0
    if repeated:
        share_it = f"{counted(repeated, word)} {'shares its' if repeated == 1 else 'share their'} name"
        notes.append(f"{share_it} with an earlier one; all are kept, one row each, in input order")
    return notes


def _way_to_embed_whole(run: EmbedRun) -> str:
    """The option by which truncated records are embedded whole: windows, where what is asked for can be had of them."""
    in_windows = not run.config.emit and not {*run.config.pool} & {*OF_ALL_RESIDUES}
    return f"--long {'window' if in_windows else 'full'} embeds them whole"


def _of_gaps(reading: Reading) -> dict[str, str]:
    """Words for what becomes of gaps, by each --gaps that does not refuse them."""
    kept = "tokens, as fair-esm does" if "-" in reading.letters else reading.unknown
    return {
        "keep": f"embedded as {kept}; --gaps strip leaves them out",
        "strip": "left out",
        "x": f"embedded as {reading.unknown}",
    }


def named(table: fasta.RecordTable, chosen: NDArray[np.bool_], config: EmbedConfig) -> str:
    """Names of the first of the chosen records, and how many more there are. chosen: mask, bool [N]."""
    from virnucpro_cli import tables

    records = np.flatnonzero(chosen)
    names = [table.names(i, i + 1, config.id == "full")[0] for i in records[:SHOWN].tolist()]
    more = [f"and {len(records) - SHOWN:,} more"] if len(records) > SHOWN else []
    shown = [tables.cell(name) or f"record {i + 1:,}" for i, name in zip(records.tolist(), names, strict=False)]
    return ", ".join([*shown, *more])


def end(run: EmbedRun) -> None:
    """Print the lines that a finished run ends with: proteins, truncated, time, file, next.

    A hidden file is another command's, which speaks of it.
    """
    summary, output, table, config = run.summary, run.output, run.table, run.config
    note_seconds(run)
    if config.verbose:
        run.out.print(report.packing_table(summary), report.throughput_table(summary))
        for title, rows in summary.tables.items():
            run.out.print(report.rows_table(title, rows))
    skipped, reason = run.file.status == store.SKIPPED, run.file.reason
    word = config.words[0]
    proteins = [f"{len(table) - int(skipped.sum()):,} of {counted(len(table), word)} embedded"]
    if skipped.any():
        reasons = {store.REASONS[code] for code in np.unique(reason[skipped]).tolist()}
        proteins.append(f"skipped: {named(table, skipped, config)} ({', '.join(sorted(reasons))})")
    counts = run.layout.extra.counts.items()
    proteins += [f"{name}: {n:,}" for name, n in counts if n and not name.startswith("names of")]
    cut = summary.counts["truncated"]
    rate = f", {summary.rates['tokens/s']:,.0f} tokens/s in the model" if "tokens/s" in summary.rates else ""
    device, dtype = (str(summary.environment[name]).removesuffix(" (auto)") for name in ("device", "dtype"))
    next_step = f"virnucpro inspect {shell_word(output)}"
    if run.shard is not None:
        next_step = f"virnucpro status {shell_word(config.output)}"
    elif (reason[skipped] == store.NO_MEMORY).any():
        next_step = "the same command with --retry-skipped, where there is more memory"
    run.out.print(f"{word + 's':<10} {'; '.join(proteins)}")
    run.out.print(f"truncated  {cut:,}" + (f"; {_way_to_embed_whole(run)}" if cut else ""))
    run.out.print(f"time       {report.clock_time(run.clock.so_far())}{rate} ({device}, in {dtype})")
    if not output.name.startswith("."):
        run.out.print(f"file       {output}, {report.size(output.stat().st_size)}")
        run.out.print(f"next       {next_step}")


def _repeated_names(table: fasta.RecordTable, config: EmbedConfig) -> int:
    """How many records have the name of an earlier one."""
    hashes = np.empty(len(table), np.uint64)

    def hash_them(rows: slice) -> None:
        hashes[rows] = table.name_texts(rows.start, rows.stop, config.id == "full").hashes()

    with threads(MOST_THREADS) as pool:  # NumPy lets go of Python
        list(pool.map(hash_them, store.blocks(len(table))))
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _counts(run: EmbedRun) -> dict[str, int]:
    table, decisions = run.table, run.decisions
    truncated, windowed, copied = (
        (decisions.flags & bit) > 0 for bit in (store.TRUNCATED, store.WINDOWED, store.COPIED)
    )
    segments, saved = decisions.segments, int(decisions.embedded[copied].sum(dtype=np.int64))
    return {
        "proteins": len(table),
        "distinct proteins": int((segments.record[1:] != segments.record[:-1]).sum()) + bool(len(segments)),
        "residues": table.residues,
        "tokens": int(segments.length.sum(dtype=np.int64)) + SPECIAL_TOKENS * len(segments),
        "truncated": int(truncated.sum()),
        "windowed": int(windowed.sum()),
        "with replaced residues": int((table.replaced > 0).sum()),
        "with gaps": int((table.gaps > 0).sum()),
        "copied from an identical one": int(copied.sum()),
        "tokens saved by copying": saved + SPECIAL_TOKENS * int(copied.sum()),
        "skipped": int((decisions.status == store.SKIPPED).sum()),
    }


def _packing(run: EmbedRun) -> dict[str, float]:
    plan = run.plan
    return {
        "packs": len(plan),
        "token budget": plan.token_budget,
        "density": plan.density,
        "density without the last pack": plan.density_without_last,
        "segments per pack": len(run.decisions.segments) / max(len(plan), 1),
        "filler tokens": int(plan.bucket.sum() - plan.tokens.sum()),
    }


def _environment(run: EmbedRun) -> dict[str, Any]:
    """Settings in words, with `(auto)` behind those that the run has chosen."""
    config, spec, computing, device = run.config, run.spec, run.computing, run.computing.device

    def chosen(value: str, asked: Any) -> str:
        return f"{value} (auto)" if asked == "auto" else value

    adapters = config.adapter if run.located is None else [str(each.folder) for each in run.located.adapters]
    return {
        "virnucpro": virnucpro_cli.__version__,
        "torch": device.torch,
        "python": platform.python_version(),
        "model": f"{spec.name} ({spec.size})",
        **({"kind": config.kind} if config.kind != PROTEIN else {}),
        **({"adapters": ", ".join(adapters)} if adapters else {}),
        "device": chosen(device.name, config.device),
        **({"workers": chosen(computing.workers, config.workers)} if computing.workers else {}),
        "dtype": chosen(devices.describe_dtype(computing.dtype), config.dtype),
        "attention": chosen(device.attention, config.attention),
        "token budget": chosen(f"{run.plan.token_budget:,}", config.token_budget),
    }


def fill_rates(run: EmbedRun, packs: Int64, placer: Placer) -> None:
    """Give the report what is known at the end. packs: numbers of those that were computed, int64 [P]."""
    summary, file = run.summary, run.file
    note_seconds(run)
    summary.rates = _rates(run, packs) | summary.rates
    summary.memory["peak host memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run.device.type == "cuda":
        summary.memory["peak GPU memory"] = torch.cuda.max_memory_allocated(run.device)
    if len(file.environments) > 1:
        done_rows = file.status == store.DONE
        summary.tables["Computed by"] = report.where_computed(file.environments, file.computed_by, done_rows)
    summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
    summary.missed += summary.counts["skipped"]
    summary.counts["recomputed in fp32"] = int(((file.flags & store.RECOMPUTED) > 0).sum())


def note_half(run: EmbedRun, half: EmbedRun, packs: Int64) -> None:
    """Give the report of a run the numbers of its half. packs: numbers of those that were computed, int64 [P]."""
    name, summary = half.half, half.summary
    note_seconds(run)
    counts = {"computed": int(np.diff(half.plan.offsets)[packs].sum()), **summary.counts}
    run.summary.counts |= {f"{name}: {what}": n for what, n in counts.items()}
    run.summary.rates |= {f"{name}: {what}": rate for what, rate in _rates(half, packs).items()}
    run.summary.notes += summary.notes
    run.summary.tables |= summary.tables


def _rates(run: EmbedRun, packs: Int64) -> dict[str, float]:
    """Contents of packs, int64 [P], by the second of the forward."""
    forward = run.clock.spent().get(report.stage_name("forward", run.half), 0.0)
    tokens, segments = int(run.plan.tokens[packs].sum()), int(np.diff(run.plan.offsets)[packs].sum())
    done = {"residues": tokens - SPECIAL_TOKENS * segments, "tokens": tokens, "segments": segments}
    return {f"{name}/s": count / forward for name, count in done.items()} if forward else {}


def describe_plan(run: EmbedRun) -> None:
    """Print what a dry run shows, and add it to the report."""
    summary, device, needed, say = run.summary, run.computing.device, run.layout.file_bytes, run.out.print
    histogram = report.by_length(run.table.length)
    summary.counts["output bytes (estimate)"] = needed
    summary.environment["weights"] = run.located.place if run.located else locate.not_here(run.spec)
    summary.environment["length histogram"] = histogram
    say(report.packing_table(summary))
    say("lengths:  " + ";  ".join(f"{label}: {n:,}" for label, n in histogram.items() if n))
    for key in ("model", "kind", "adapters", "weights", "device", "workers", "dtype", "attention", "token budget"):
        if key in summary.environment:
            say(f"{key}: {summary.environment[key]}")
    free = store.free_space(run.output)
    room = "its file system does not say how much is free" if free is None else f"{report.size(free)} are free there"
    enough = "" if store.has_room(run.output, needed) else ", WHICH IS NOT ENOUGH"
    say(f"output: at most {report.size(needed)}; {room}{enough}")
    seconds = _forward_seconds(run)
    if seconds is None:
        name = devices.short_name(run.computing.dtype)
        say(f"time: no measured rate for {device.name} in {name}, so no estimate")
    else:
        run.clock.meanwhile["forward (estimate)"] = seconds
        say(f"time: about {report.clock_time(seconds)} of forward, an estimate from FLOPs and a measured rate")


def _forward_seconds(run: EmbedRun) -> float | None:
    """An estimate from FLOPs and a measured rate; None if there is none for this device and dtype."""
    length = run.decisions.segments.length.astype(np.float64) + SPECIAL_TOKENS
    operations = flops(run.spec, float(run.plan.bucket.sum()), float((length**2).sum()), max(run.layers))
    device, dtype = run.computing.device, devices.short_name(run.computing.dtype)
    if "H100" in device.name:
        kind, count = "H100", run.computing.gpus
    elif device.kind == "cpu":
        kind, count = "CPU thread", torch.get_num_threads()
    else:
        return None
    rates = [rate for width, rate in MEASURED_FLOPS.get((kind, dtype), {}).items() if width <= run.spec.hidden]
    return operations / (max(rates) * count) if rates else None
