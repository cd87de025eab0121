"""DNABERT-S on this GPU: speed beside its GEMM floor and beside one slice a call; noise; the same bits; both halves.

    python benchmarks/dnabert.py [--seconds 4] [--whole CHUNKS] [--protein-model random:3B]

Random weights and random tokens of slices of 500-base chunks (86 to 116 tokens). `--whole` times `virnucpro embed
--from contigs --genes virnucpro` on so many made-up chunks, some .6 frames each, without and with `--nucleotide`.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli import fasta
from virnucpro_cli.benchmark import limits, modes, workload
from virnucpro_cli.engine import devices
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.fasta.tokenised import as_counted
from virnucpro_cli.model import attention, families, weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.kernels import postnorm
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.plan.packing import whole_segments
from virnucpro_cli.validation import dnabert as oracle

DEVICE = torch.device("cuda")
TOKENS = (84, 115)
"""Tokens of a slice without its first and last, at least and below."""


def seconds_of(call):
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def slices(count, folder, reading):
    """A workload of random tokens."""
    dice = np.random.default_rng(0)
    path = write_texts(folder / "slices.fna", [b"%d" % i for i in range(count)])
    table = fasta.index(fasta.open_sources([str(path)], folder), dedup=False, reading=reading)
    sizes = dice.integers(*TOKENS, count).astype(np.int32)
    table = as_counted(table, sizes)
    table.ids = dice.integers(5, 4096, int(sizes.sum())).astype(np.uint16)
    table.first = np.cumsum(sizes, dtype=np.int64) - sizes
    return workload.Workload("slices", table, whole_segments(np.arange(count), sizes.astype(np.int64)))


def models_of(spec, state, dtype):
    """The model with kernels, and with plain steps."""
    backend = attention.resolve("auto", DEVICE, dtype)
    model = build(spec, state, dtype, DEVICE, backend)
    fall = torch.tensor(postnorm.slopes(spec.heads), device=DEVICE)

    def plain_attention(*given):
        return postnorm.by_sdpa(*given, slopes=fall)

    return model, model._with(backend=model.backend._replace(attention=plain_attention, steps=postnorm.steps(False)))


def speed(spec, state, folder, seconds):
    rows, found = devices.auto_token_budget("cuda", devices.free_memory(DEVICE), spec.hidden, 0), []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model, _ = models_of(spec, state, dtype)
        work = slices(4 * rows // 102, folder, families.reading(spec, "nucleotide"))
        way, *_ = modes.packed(model, work, rows)
        way.run()
        floor = limits.measure(spec, dtype, DEVICE, rows).gemm_floor
        taken = [seconds_of(way.run) for _ in range(max(3, int(seconds / seconds_of(way.run))))]
        rate = way.used / float(np.median(taken))
        split = limits.breakdown(way.run, DEVICE)
        row = {
            "dtype": attention.describe(dtype), "rows": rows, "tokens/s": rate, "slices/s": rate / work.sizes.mean(),
            "GEMM floor": floor, "of the floor": rate / floor,
            **{f"% {kind}": 100 * each / sum(split.values()) for kind, each in split.items()},
        }  # fmt: skip
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def one_a_call(spec, state, packed):
    """The original's way: one slice a call, in plain PyTorch, its mean on the host."""
    dice = np.random.default_rng(1)
    sizes = dice.integers(*TOKENS, 64).tolist()
    slices = [torch.tensor([[1, *dice.integers(5, 4096, n).tolist(), 2]], device=DEVICE) for n in sizes]
    for dtype in (torch.float32, torch.float16):
        wide = {name: each.to(DEVICE, dtype) for name, each in state.items() if "inv_freq" not in name}
        with torch.inference_mode():
            rate = len(slices) / min(
                seconds_of(partial(all_of, oracle._as_published(spec, wide), slices)) for _ in range(3)
            )
        ratios = {row["dtype"]: row["slices/s"] / rate for row in packed}
        found = {"one slice a call": attention.describe(dtype), "slices/s": rate, "packed is faster by": ratios}
        print(json.dumps(found), flush=True)


def all_of(run, slices):
    for each in slices:
        run(each, torch.ones_like(each, dtype=torch.bool))[-1].mean(1).cpu()


def noise_and_bits(spec, state, folder):
    """Relative L2 of means against fp32, of kernels and of plain steps; slices whose bits change with their company."""
    work = slices(300, folder, families.reading(spec, "nucleotide"))
    exact = modes.packed(models_of(spec, state, torch.float32)[1], work, 32768)[0].run().double()
    for dtype in (torch.float16, torch.bfloat16):
        errors, model = {}, None
        for name, each in zip(("kernels", "plain"), models_of(spec, state, dtype), strict=True):
            means = modes.packed(each, work, 32768)[0].run().double()
            errors[name] = ((means - exact).norm(dim=1) / exact.norm(dim=1)).cpu().numpy()
            model = model or each
        bits = [modes.packed(model, work, rows)[0].run() for rows in (1024, 2048, 4096, 8192, 16384, 32768)]
        changed = sum(int((each != bits[0]).any(dim=1).sum()) for each in bits[1:])
        row = {
            "dtype": attention.describe(dtype), "median, kernels": np.median(errors["kernels"]),
            "median, plain": np.median(errors["plain"]), "worst, kernels": errors["kernels"].max(),
            "worst, plain": errors["plain"].max(), "slices whose bits change": changed,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def made_up_chunks(path, count):
    """Contigs of one chunk each: some have a frame without a stop."""
    dice = random.Random(0)
    codons = [a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG" if a + b + c not in ("TAA", "TAG", "TGA")]
    with open(path, "w") as file:
        for i in range(count):
            coding = dice.random() < 0.5
            bases = "".join(dice.choices(codons, k=166)) + "AC" if coding else "".join(dice.choices("ACGT", k=500))
            file.write(f">c{i}\n{bases}\n")


def whole(chunks, model, folder):
    made_up_chunks(folder / "contigs.fna", chunks)
    made_up_chunks(folder / "few.fna", 200)
    told = ["--from", "contigs", "--genes", "virnucpro", "-q", "--model", model]
    seconds = {}
    for name, inputs, more in (
        ("warm-up", "few.fna", ["--nucleotide", "--nucleotide-model", "random:dnabert-s"]),
        ("proteins alone", "contigs.fna", []),
        ("both halves", "contigs.fna", ["--nucleotide", "--nucleotide-model", "random:dnabert-s"]),
    ):
        output, report = folder / f"{name[:4]}.h5", folder / f"{name[:4]}.json"
        command = [
            sys.executable,
            "-m",
            "virnucpro_cli",
            "embed",
            str(folder / inputs),
            "-o",
            str(output),
            *told,
            *more,
        ]
        started = time.perf_counter()
        subprocess.run([*command, "--report", str(report)], check=True)
        seconds[name] = time.perf_counter() - started
        said = json.loads(report.read_text())
        stages = {stage: round(each, 2) for stage, each in said["seconds"].items() if each >= 0.01}
        print(
            json.dumps({"run": name, "wall": seconds[name], "proteins": said["counts"]["proteins"], "stages": stages}),
            flush=True,
        )
        output.unlink()
    ratio = seconds["both halves"] / seconds["proteins alone"]
    print(
        json.dumps({"both halves over proteins alone": ratio, "chunks/s": chunks / seconds["both halves"]}), flush=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--whole", type=int, default=0, metavar="CHUNKS")
    parser.add_argument("--protein-model", default="random:3B")
    parser.add_argument("--size", default="DNABERT-S")
    given = parser.parse_args()
    exact_arithmetic()
    spec = families.SIZES[given.size]
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), weights.random_state(spec, 0)
        noise_and_bits(spec, state, folder)
        one_a_call(spec, state, speed(spec, state, folder, given.seconds))
        if given.whole:
            whole(given.whole, given.protein_model, folder)


if __name__ == "__main__":
    main()
