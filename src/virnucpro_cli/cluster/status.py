"""The status workflow: which shards of an output are there, and how far each is. It needs the files alone."""

from pathlib import Path

import numpy as np

from virnucpro_cli import report, store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.plan import shards


def show_shards(output: str) -> bool:
    """Print a line for each shard of `output` to standard output. Returns whether only the merge, or nothing, is left.

    Raises UserError if there is neither a shard nor the output itself.
    """
    target = store.behind(Path(output))
    out = report.stdout()
    sets = shards.files_of(target)
    merged = store.fingerprint_of(target) if target.exists() else None
    if merged is not None:
        out.print(f"{target} is {'complete' if merged[1] else 'not complete'}")
    elif store.partial_path(target).exists():
        with store.opened(store.partial_path(target)) as file:
            out.print(f"{target} is {store.unfinished(file)}; the embed command, again, goes on")
        if not sets:
            return False
    elif not sets:
        raise UserError(f"There is neither {target} nor a shard of it.", "virnucpro embed ... --shard 1/40 makes one.")
    done = merged is not None and merged[1]
    for count, files in sorted(sets.items()):
        complete = 0
        names = ("shard", "state", "proteins", "skipped", "file")
        table = report.columns_table(f"{target} in {counted(count, 'shard')}", names, ("state", "file"))
        for number in range(1, count + 1):
            words = _state(files.get(number))
            complete += words[0] == "complete"
            table.add_row(str(number), *words)
        out.print(table)
        ready = (
            f"virnucpro merge {target}" if complete == count else "those that are not: the command of their run, again"
        )
        out.print(f"{complete:,} of {counted(count, 'shard')} complete; {ready}")
        done = done or complete == count
    return done


def _state(path: Path | None) -> tuple[str, str, str, str]:
    """State, proteins, skipped ones and name of a shard's file."""
    if path is None:
        return "missing", "", "", ""
    try:
        with store.opened(str(path)) as file:
            skipped = int(np.count_nonzero(file.status == store.SKIPPED))
            settled = int(np.count_nonzero(file.status != store.PENDING))
            state = "complete" if file.complete else f"partial, {settled / max(len(file), 1):.0%}"
            return state, f"{len(file):,}", f"{skipped:,}", path.name
    except UserError:
        return "damaged, remove it", "", "", path.name
