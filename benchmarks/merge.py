"""`virnucpro merge` of many shards beside the rate of the disk, in one run.

    python benchmarks/merge.py FOLDER [--records 1000000] [--shards 40] [--width 1280] [--residues 0] [--keep]

Shards are made with random rows, and left out of memory before the merge. `--keep` keeps them: a second call with the
same FOLDER merges them again, as with another checkout in PYTHONPATH. `--residues` adds that many rows to each record.
The disk's rate: as many bytes as the merged file has, written in blocks of 16 MiB by one thread, and synced.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from scaling import write_model

from virnucpro_cli import embed_fasta, store
from virnucpro_cli.cluster.merge import merge_shards
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan import shards

BLOCK = 1 << 24


def attributes(folder, width, kinds):
    """Attributes of a shard that embed wrote."""
    template = folder / "template"
    shutil.rmtree(template, ignore_errors=True)
    template.mkdir()
    model = write_model(ModelSpec("one", 1, width, width // 16), template / "model")
    (template / "in.fasta").write_text(">a\nMKVLAGW\n")
    output = template / "out.h5"
    embed_fasta(str(template / "in.fasta"), str(output), model=str(model), pool=kinds, shard="1/1", device="cpu")
    with store.read_embeddings(shards.path(output, shards.Shard(1, 1))) as file:
        found = dict(file.attributes), json.dumps(file.environments[0])
    shutil.rmtree(template)
    return found


def write_shards(output, options, kinds):
    dice, n = np.random.default_rng(0), options.records
    told, environment = attributes(output.parent, options.width, kinds)
    owner = dice.integers(0, options.shards, n)
    noise = dice.standard_normal((1 << 14, options.width), np.float32).astype(np.float16)
    for number in range(options.shards):
        records = np.flatnonzero(owner == number)
        m = len(records)
        fingerprint = json.loads(told["fingerprint"]) | {"shard": f"{number + 1}/{options.shards}"}
        own = told | {"fingerprint": json.dumps(fingerprint)}
        zeros, sizes = np.zeros(m, np.uint8), np.full(m, max(30, options.residues), np.int32)
        layout = store.Layout(
            options.width, (1,), kinds, np.dtype(np.float16), sizes, sizes * 0, zeros.astype(np.uint16), zeros, zeros,
            np.arange(m + 1) * options.residues if options.residues else None,
            lambda a, b, records=records: [f"protein_{i}" for i in records[a:b].tolist()], 20 * m, records, environment,
            attributes=own,
        )  # fmt: skip
        file = store.Store.create(shards.path(output, shards.Shard(number + 1, options.shards)), layout)
        with file.filling():
            for start in range(0, m, 1 << 14):
                rows = np.arange(start, min(m, start + (1 << 14)))
                file.place("mean", 1, rows, np.roll(noise, start)[: len(rows)])
                for i in rows.tolist() if options.residues else ():
                    at = np.arange(i * options.residues, (i + 1) * options.residues)
                    file.place("residue", 1, at, noise[i % 100 : i % 100 + len(at)].copy())
                file.mark(rows)
            file.finish("{}", overwrite=False)


def disk_rate(path, size):
    """Bytes/s of plain writes with a sync."""
    block = np.random.default_rng(0).bytes(BLOCK)
    with open(path, "wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(-(-size // BLOCK)):
            file.write(block)
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    path.unlink()
    return size / seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--residues", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    output = options.folder / "out.h5"
    if not shards.files_of(output):
        write_shards(output, options, ("mean", "residue") if options.residues else ("mean",))
    output.unlink(missing_ok=True)
    paths = list(shards.files_of(output)[options.shards].values())
    os.sync()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started, cpu = time.perf_counter(), time.process_time()
    summary = merge_shards(str(output))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    size = output.stat().st_size
    rate = disk_rate(options.folder / "rate", size)
    print(json.dumps({
        "records": options.records, "shards": options.shards, "width": options.width, "residues": options.residues,
        "GB": round(size / 1e9, 2), "s": round(seconds, 2), "CPU s": round(cpu, 2), "MB/s": round(size / seconds / 1e6),
        "disk MB/s": round(rate / 1e6), "stages": summary.seconds, "checksum": summary.checksum,
    }))  # fmt: skip
    if not options.keep:
        for path in (*paths, output):
            path.unlink()


if __name__ == "__main__":
    main()
