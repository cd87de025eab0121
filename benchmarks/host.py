"""Whole commands of two checkouts beside each other: seconds from the first to the last, and by stage.

    python benchmarks/host.py OLD_CHECKOUT [--records 10000000] [--fragments 400000] [--residues 20000] [--repeat 1]

`--records`: short random proteins by the 8M. `--fragments`: lengths of VirNucPro's windows by the 8M, first with empty
caches of kernels, as on a new machine. `--residues`: natural lengths by the 650M, means and then rows of residues too,
and the rate of the disk. Weights are random. 0 leaves one out. Peak memory is that of
the largest process. The last line is all of it as JSON.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from beside import HERE, started
from markdown import table
from merge import disk_rate

from virnucpro_cli.benchmark import workload

CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def write_fasta(path: Path, lengths: np.ndarray) -> Path:
    """Random proteins of these lengths, int64 [n]."""
    dice, letters = np.random.default_rng(0), np.frombuffer(workload.RESIDUES, np.uint8)
    with open(path, "wb") as file:
        for start in range(0, len(lengths), 100_000):
            own = lengths[start : start + 100_000]
            text, ends = letters[dice.integers(0, 20, int(own.sum()))].tobytes(), np.cumsum(own).tolist()
            begins = [0, *ends[:-1]]
            file.writelines(
                b">p%09d made up\n%s\n" % (start + i, text[a:b])
                for i, (a, b) in enumerate(zip(begins, ends, strict=True))
            )
    return path


def timed(name: str, checkout: Path, fasta: Path, options: str) -> dict[str, Any]:
    """Wall seconds of an embed, and its report's stages."""
    output, report = fasta.with_suffix(".h5"), fasta.with_suffix(".json")
    output.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    process = started(checkout, "embed", str(fasta), "-o", str(output), "-q", "--report", str(report), *options.split())
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        sys.exit(f"{checkout.name}: {process.stderr.read()}")
    found = json.loads(report.read_text())
    stages = {stage: round(seconds, 2) for stage, seconds in found["seconds"].items()}
    rate = found["rates"].get("tokens/s", 0)
    build, memory = "new" if checkout == HERE else "old", used.ru_maxrss / 2**20
    print(name, build, f"{wall:.1f} s", stages, f"{rate:,.0f} tokens/s, {memory:.2f} GiB of memory", flush=True)
    return {"load": name, "of": build, "wall": wall, "tokens/s": rate, "GiB": memory, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("--records", type=int, default=10**7)
    parser.add_argument("--fragments", type=int, default=400_000)
    parser.add_argument("--residues", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--dir", help="a folder on the disk to write to")
    options = parser.parse_args()
    both, dice, rows = (options.old.resolve(), HERE), np.random.default_rng(1), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        if options.fragments:
            lengths = workload.fragments(600 * options.fragments, dice)[: options.fragments]
            fasta = write_fasta(folder / "fragments.fasta", lengths)
            for checkout in both:
                os.environ |= {cache: str(folder / f"{checkout.name}-{cache}") for cache in CACHES}
                rows.append(timed("fragments, first", checkout, fasta, "--model random:8M"))
                for _ in range(options.repeat):
                    rows.append(timed("fragments", checkout, fasta, "--model random:8M"))
        if options.residues:
            lengths = workload.natural(600 * options.residues, dice)[: options.residues]
            fasta = write_fasta(folder / "natural.fasta", np.minimum(lengths, 1022))
            for checkout in both * options.repeat:
                for pool in ("mean", "mean,residue"):
                    rows.append(timed(f"natural, {pool}", checkout, fasta, f"--model random:650M --pool {pool}"))
            size = fasta.with_suffix(".h5").stat().st_size
            print(f"plain synced writes of {size / 1e9:.1f} GB: {disk_rate(folder / 'plain', size) / 1e6:.0f} MB/s")
        if options.records:
            fasta = write_fasta(folder / "records.fasta", dice.integers(30, 91, options.records))
            for checkout in both * options.repeat:
                rows.append(timed("records", checkout, fasta, "--model random:8M"))
        shutil.rmtree(folder, ignore_errors=True)
    print(*table([{key: value for key, value in row.items() if key != "stages"} for row in rows]), sep="\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(main())
