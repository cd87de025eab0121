"""Families of one width beside each other on this GPU: the packed forward as a share of its own GEMM floor.

    python benchmarks/widths.py [--models 650M,esm1b,3B,lucavirus] [--rounds 5]

Random weights, fp16, mean pooling, packs of the budget that a run would choose, medians of interleaved rounds.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from esmc import DEVICE, LOADS, freed, rows_of, seconds_of

from virnucpro_cli.benchmark import limits, modes, workload
from virnucpro_cli.model import attention, families, weights
from virnucpro_cli.model.packed import exact_arithmetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="650M,esm1b,3B,lucavirus")
    parser.add_argument("--rounds", type=int, default=5)
    given, dtype = parser.parse_args(), torch.float16
    print("| model | load | tokens/s | of its GEMM floor |\n|---|---|---|---|", flush=True)
    exact_arithmetic()
    backend = attention.resolve("triton", DEVICE, dtype)
    for name in given.models.split(","):
        spec = families.by_name(name)
        assert spec is not None, name
        rows, dice = rows_of(spec), np.random.default_rng(0)
        state = weights.random_state(spec, 0, DEVICE)
        model = families.build(spec, state, dtype, DEVICE, backend)
        del state
        with tempfile.TemporaryDirectory() as folder:
            works = {}
            for load in LOADS:
                lengths = getattr(workload, load)(2 * rows, dice)
                work = workload.made_up(load, lengths, Path(folder), 1022, reading=families.family_of(spec).READING)
                works[load] = modes.packed(model, work, rows)[0]
                works[load].run()
            floor = limits.measure(spec, dtype, DEVICE, rows).gemm_floor
            times = {load: [] for load in LOADS}
            for _ in range(given.rounds):
                for load, way in works.items():
                    times[load].append(seconds_of(way.run))
        for load, way in works.items():
            rate = way.used / float(np.median(times[load]))
            print(f"| {spec.name} | {load} | {rate:,.0f} | {rate / floor:.3f} |", flush=True)
        del model, works
        freed()


if __name__ == "__main__":
    main()
