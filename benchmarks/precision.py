"""What each compute dtype costs and loses, with the residual stream in the same dtype and in fp32.

Errors: relative L2 against fair-esm in fp32 over the proteins that ship with virnucpro, real demo weights. Cost: tokens
a second of the forward with mean pooling, random weights, packs of natural lengths, interleaved rounds, median.

    python benchmarks/precision.py [--model random:650M] [--device cuda] [--rounds 5]
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli import fasta
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.model import attention, locate, weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import first_fit_decreasing, whole_segments
from virnucpro_cli.validation import agreement, invariance, oracle, oracle_of, validate


def models(name, device, dtypes):
    spec, state, _ = weights.load(locate.verified(locate.fetch(name, print)))
    for short in dtypes:
        dtype = devices.DTYPES[short]
        for residual in ("same",) if dtype == torch.float32 else ("same", "fp32"):
            kernel = "torch_varlen" if device.type == "cuda" else "auto"
            yield short, residual, build(spec, state, dtype, device, attention.resolve(kernel, device, dtype, residual))


def errors(device, dtypes, size):
    spec, state, _ = weights.load(locate.verified(locate.fetch("demo", print)))
    sample, _ = validate.choose(validate.shipped(), ValidateConfig(sample=size), oracle_of(spec))
    layers = (spec.layers,)
    truth = oracle.rows_of(oracle_of(spec)(spec, state), sample, layers)
    with tempfile.TemporaryDirectory() as folder:
        path = write_texts(Path(folder) / "sample.fasta", sample.texts)
        table = fasta.index(fasta.open_sources([str(path)], path.parent), dedup=False)
        for short, residual, model in models("demo", device, dtypes):
            alone = [[record] for record in range(len(sample))]
            rows = [found for _, found in invariance.in_packs(model, layers, sample.lengths, table, alone)]
            found = {key: np.concatenate([np.atleast_2d(row[key]) for row in rows]) for key in truth}
            for kind in ("mean", "bos", "residue"):
                e = agreement.relative_l2(found[kind, spec.layers], truth[kind, spec.layers])
                cosine = agreement.cosine(found[kind, spec.layers], truth[kind, spec.layers])
                print(
                    f"demo {short} residual {residual:4} {kind:7} relative L2 median {np.median(e):.2e} "
                    f"99% {np.quantile(e, 0.99):.2e} worst {e.max():.2e} cosine min {cosine.min():.6f}",
                    flush=True,
                )


def cost(name, device, dtypes, rounds, lengths):
    budget = 32768 if device.type == "cuda" else 2048
    dice = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        texts = [bytes(dice.choice(np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8), n)) for n in lengths]
        path = write_texts(Path(folder) / "cost.fasta", texts)
        table = fasta.index(fasta.open_sources([str(path)], path.parent), dedup=False)
        segments = whole_segments(np.arange(len(table)), table.length.astype(np.int64), 1022)
        plan = first_fit_decreasing(segments.length, budget)
        collate = VarlenCollator(table, segments, segments.length, plan, pin=device.type == "cuda")
        batches = [collate(pack).to(device) for pack in range(len(plan))]
    tokens = int(plan.tokens.sum())

    def forward(model):
        for batch in batches:
            model.embed(batch, (model.spec.layers,), Pooler(("mean",), torch.float16))
        if device.type == "cuda":
            torch.cuda.synchronize()

    every = [(short, residual, partial(forward, model)) for short, residual, model in models(name, device, dtypes)]
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for short, residual, run in every:
            started = time.perf_counter()
            run()
            if turn:
                seconds.setdefault((short, residual), []).append(time.perf_counter() - started)
    for (short, residual), each in seconds.items():
        rate, spread = tokens / np.median(each), min(each) / max(each)
        print(f"{name} {short} residual {residual:4} {rate:,.0f} tokens/s (spread {spread:.2f})", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:650M")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="fp16,bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=128)
    parser.add_argument("--proteins", type=int, default=1000)
    options = parser.parse_args()
    exact_arithmetic()
    on = devices.resolve_device(options.device)
    errors(on, options.dtypes.split(","), options.sample)
    generator = np.random.default_rng(0)
    natural = np.clip(generator.lognormal(5.8, 0.75, options.proteins), 30, 1022).astype(int)
    cost(options.model, on, options.dtypes.split(","), options.rounds, natural)
