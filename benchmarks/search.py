"""`virnucpro search` beside the flat index of faiss-cpu, in turn in one run: seconds, and whether hits are the same.

    python benchmarks/search.py [--rows 100000] [--queries 10000] [--width 1280] [-k 10] [--rounds 2]

Rows are random directions around 1,000 centres, in fp16 as in a file. Faiss gets them centred, of length 1 and in fp32,
which is not timed. The search is timed from the file: reading, centring, and the final products in fp64.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from virnucpro_cli import store
from virnucpro_cli.engine import devices
from virnucpro_cli.explore import search
from virnucpro_cli.explore.default_rows import Pooled

BLOCK = 1 << 14
CPU = torch.device("cpu")


def write_rows(path, rows, width):
    dice = np.random.default_rng(0)
    centres = dice.standard_normal((1000, width), np.float32) + 1
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        array[start : start + n] = centres[dice.integers(0, 1000, n)] + dice.standard_normal((n, width), np.float32)
    return array


def timed(call, *arguments):
    started, cpu = time.perf_counter(), time.process_time()
    result = call(*arguments)
    return (time.perf_counter() - started, time.process_time() - cpu), result


def searched(data, queries, k, mean):
    """As the command does: so many queries at a time."""
    parts = [queries[part] for part in store.blocks(len(queries), min(search.QUERIES, search.HITS // k))]
    return np.concatenate([search.nearest(data, each, np.full(len(each), -1), k, mean, CPU)[0] for each in parts])


def main():
    parser = argparse.ArgumentParser()
    devices.keep_freed_memory()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        array = write_rows(Path(folder) / "rows.npy", options.rows, options.width)
        data = Pooled(None, "mean", 33, array, np.arange(options.rows))
        mean = data.mean()
        dice = np.random.default_rng(1)
        near = array[np.sort(dice.choice(options.rows, options.queries, replace=False))].astype(np.float64)
        queries = search.directions(near + dice.standard_normal(near.shape), mean)
        flat = faiss.IndexFlatIP(options.width)
        for _, values in data.blocks():
            flat.add(search.directions(values.astype(np.float64), mean).astype(np.float32))
        single = queries.astype(np.float32)
        times = {"faiss": [], "search": []}
        for _ in range(options.rounds):
            seconds, (_, theirs) = timed(flat.search, single, options.k)
            times["faiss"].append(seconds)
            seconds, hits = timed(searched, data, queries, options.k, mean)
            times["search"].append(seconds)
        same = float(
            np.mean([len(set(a) & set(b)) / options.k for a, b in zip(hits.tolist(), theirs.tolist(), strict=True)])
        )
    best = {name: min(each) for name, each in times.items()}
    print(json.dumps({
        "rows": options.rows, "queries": options.queries, "width": options.width, "k": options.k,
        **{f"{name} s, CPU s": [round(each, 2) for each in times] for name, times in best.items()},
        "search over faiss": [round(a / b, 2) for a, b in zip(best["search"], best["faiss"], strict=True)],
        "same neighbours": same,
        "threads": torch.get_num_threads(), "faiss": faiss.__version__, "torch": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
