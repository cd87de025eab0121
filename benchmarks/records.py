"""A whole `embed` run over millions of short records: seconds by stage, peak memory, and the file read back.

    python benchmarks/records.py [--records 1000000] [--model 8M] [--workers auto]

Random proteins of 30-90 residues, one in a hundred a copy of another. The model is random; `tiny` is a layer of width
16.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scaling import write_model

from virnucpro_cli import report, store
from virnucpro_cli.benchmark.workload import RESIDUES
from virnucpro_cli.model.spec import ModelSpec

BLOCK = 100_000
TINY = ModelSpec("tiny", 1, 16, 2)


def write_fasta(path, records):
    dice, letters = np.random.default_rng(0), np.frombuffer(RESIDUES, np.uint8)
    with open(path, "wb") as file:
        for start in range(0, records, BLOCK):
            lengths = dice.integers(30, 91, min(BLOCK, records - start)).tolist()
            text = letters[dice.integers(0, len(letters), sum(lengths))].tobytes()
            parts, at = [], 0
            for i, length in enumerate(lengths):
                own = text[: lengths[0]] if i % 100 == 99 else text[at : at + length]
                parts.append(b">r%08d made up\n%s\n" % (start + i, own))
                at += length
            file.writelines(parts)


def timed(*command):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "virnucpro_cli", *command], check=True, stderr=subprocess.PIPE)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--model", default="8M")
    parser.add_argument("--workers", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, output, written = folder / "in.fasta", folder / "out.h5", folder / "report.json"
        write_fasta(path, options.records)
        model = str(write_model(TINY, folder / "tiny")) if options.model == "tiny" else f"random:{options.model}"
        how = ["--model", model, "--workers", options.workers, "--report", str(written)]
        wall = timed("embed", str(path), "-o", str(output), *how)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        verify = timed("verify", str(output), "--fasta", str(path))
        found = json.loads(written.read_text())
        rows = [{"what": name, "s": seconds} for name, seconds in found["seconds"].items()]
        rows += [{"what": "whole embed", "s": wall}, {"what": "whole verify", "s": verify}]
        report.console(False).print(report.rows_table(f"{options.records:,} records, {options.model}", rows))
        with store.read_embeddings(output) as file:
            assert len(file) == options.records and file.complete and np.isfinite(file[-1000:]).all()
        print(json.dumps({
            "records": options.records, "model": options.model, "device": found["environment"]["device"],
            "torch": torch.__version__, "tokens": found["counts"]["tokens"], "wall s": round(wall, 1),
            "seconds": found["seconds"],
            "peak host memory of a process": report.size(peak), "file": report.size(output.stat().st_size),
            "tokens/s": round(found["rates"]["tokens/s"]), "copied": found["counts"]["copied from an identical one"],
        }))  # fmt: skip


if __name__ == "__main__":
    main()
