"""Two checkouts of this project beside each other: the same bits in every dataset, and the same speed.

    python benchmarks/beside.py OLD_CHECKOUT [--same FASTA ...] [--speed 650M] [--natural 8000] [--fragments 30000]

`--same` embeds each FASTA with a dozen sets of options by both (`--model`, else the demo) and compares each dataset.
`--speed` times both in turn (old, new, new, old) with random weights: `bench --packed`, then whole runs of `embed`.
The last line is the result as JSON; it exits 1 if a dataset differs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py

HERE = Path(__file__).resolve().parents[1]
OPTIONS = [
    "--pool mean,bos,eos,max,std",
    "--pool mean,residue --layers 0,1,2",
    "--pool mean --long window --max-residues 200 --overlap 50",
    "--pool mean --long skip",
    "--pool mean,max --long full",
    "--pool mean --store-dtype fp32 --layers 0,-1",
    "--pool mean --no-dedup --token-budget 4096",
    "--pool mean --invalid skip",
    "--pool mean --dtype bf16",
    "--pool mean --workers 2",
    "--pool mean --group-regex ^(.).*",
    "--pool mean --id full --attention sdpa",
    "--pool mean --emit entropy,logits",
]


def started(checkout: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "virnucpro_cli", *arguments]
    path = os.pathsep.join([str(checkout / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def program(checkout: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    process = started(checkout, *arguments)
    out, err = process.communicate()
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check and done.returncode:
        sys.exit(f"{checkout.name}: {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done


def datasets(path: Path) -> dict[str, h5py.Dataset]:
    """Every dataset of a file by name, but what it says of its runs."""
    names: dict[str, h5py.Dataset] = {}
    file = h5py.File(path)
    file.visititems(lambda name, node: names.update({name: node}) if isinstance(node, h5py.Dataset) else None)
    return {name: each for name, each in names.items() if not name.startswith("run/")}


def equal(old: h5py.Dataset, new: h5py.Dataset | None) -> bool:
    if new is None or old.dtype != new.dtype or old.shape != new.shape:
        return False
    a, b = old[()], new[()]
    return list(a) == list(b) if a.dtype == object else a.tobytes() == b.tobytes()


def same_bits(old: Path, fastas: list[str], model: str, folder: Path) -> tuple[int, list[str]]:
    """Number of datasets compared, and those that differ."""
    compared, different = 0, []
    for fasta in fastas:
        for options in OPTIONS:
            arguments = [fasta, "--model", model, "--device", "cpu", "-q", *options.split()]
            files = {}
            for name, checkout in (("old", old), ("new", HERE)):
                files[name] = folder / f"{name}.h5"
                files[name].unlink(missing_ok=True)
                program(checkout, "embed", *arguments, "-o", str(files[name]), check=False)  # 3: records skipped
            a, b = datasets(files["old"]), datasets(files["new"])
            unequal = [name for name, each in a.items() if not equal(each, b.get(name))]
            compared += len(a)
            different += [f"{Path(fasta).name} {options}: {name}" for name in unequal]
            print(
                f"{Path(fasta).name:28} {options:60} {len(a):3} datasets",
                "DIFFERENT" if unequal else "equal",
                flush=True,
            )
    return compared, different


def embed(checkout: Path, model: Path, fasta: Path, folder: Path) -> dict[str, float]:
    out, report = folder / "timed.h5", folder / "timed.json"
    out.unlink(missing_ok=True)
    begun = time.perf_counter()
    program(checkout, "embed", str(fasta), "-o", str(out), "--model", str(model), "-q", "--report", str(report))
    told = json.loads(report.read_text())
    return {"forward tokens/s": told["rates"]["tokens/s"], "whole command, s": time.perf_counter() - begun}


def speed(old: Path, size: str, counts: dict[str, int], folder: Path) -> list[tuple[str, float, float]]:
    """(name, old, new) of each figure: medians of two runs each, in the order old, new, new, old."""
    from scaling import write_fasta, write_model

    from virnucpro_cli.model.families import by_name

    order = [old, HERE, HERE, old]
    figures: dict[str, list[tuple[Path, float]]] = {}
    for checkout in order:
        done = program(checkout, "bench", "--packed", "--model", size, "--seconds", "20", "--json")
        for each in json.loads(done.stdout.splitlines()[-1])["tables"]["Throughput"]:
            if each["mode"].startswith("packed"):
                name = f"bench, {each['workload']}, tokens/s"
                figures.setdefault(name, []).append((checkout, each["tokens/s"]))
    model = write_model(by_name(size), folder / "model")
    for load, count in counts.items():
        fasta = write_fasta(load, count, folder)
        embed(HERE, model, fasta, folder)  # the disk and Triton's cache are warm for both
        for checkout in order:
            for name, value in embed(checkout, model, fasta, folder).items():
                figures.setdefault(f"embed, {count:,} {load}, {name}", []).append((checkout, value))
    return [
        (name, *(statistics.median(value for at, value in all_of if at == checkout) for checkout in (old, HERE)))
        for name, all_of in figures.items()
    ]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("old", type=Path)
    asked.add_argument("--same", nargs="*", default=[])
    asked.add_argument("--model", default="demo")
    asked.add_argument("--speed")
    asked.add_argument("--natural", type=int, default=8000)
    asked.add_argument("--fragments", type=int, default=30000)
    args = asked.parse_args()
    folder = Path(tempfile.mkdtemp())
    result: dict[str, object] = {}
    try:
        if args.same:
            compared, different = same_bits(args.old.resolve(), args.same, args.model, folder)
            print(f"{compared} datasets compared, {len(different)} different", *different, sep="\n")
            result |= {"compared": compared, "different": different}
        if args.speed:
            counts = {"natural": args.natural, "fragments": args.fragments}
            for name, before, after in speed(args.old.resolve(), args.speed, counts, folder):
                print(f"{name:50} old {before:12,.1f}  new {after:12,.1f}  new/old {after / before:.4f}", flush=True)
                result[name] = [before, after]
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result))
    sys.exit(1 if result.get("different") else 0)


if __name__ == "__main__":
    main()
