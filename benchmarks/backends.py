"""Attention backends and their steps beside each other on this GPU: the packed forward as a share of its GEMM floor.

    python benchmarks/backends.py [--models 650M,150M] [--backends torch_varlen,portable,triton] [--dtype fp16]

Random weights, mean pooling, packs of the budget that a run would choose, medians of interleaved rounds. Ratios are to
the first backend.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from esmc import DEVICE, LOADS, freed, rows_of, seconds_of

from virnucpro_cli.benchmark import limits, modes, workload
from virnucpro_cli.engine.devices import DTYPES
from virnucpro_cli.model import attention, families, weights
from virnucpro_cli.model.packed import exact_arithmetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="650M,150M")
    parser.add_argument("--backends", default="torch_varlen,portable,triton")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    dtype, names = DTYPES[given.dtype], given.backends.split(",")
    exact_arithmetic()
    print("| model | load | backend | tokens/s | of the GEMM floor | times the first |\n|---|---|---|---|---|---|")
    for model_name in given.models.split(","):
        spec = families.by_name(model_name)
        assert spec is not None, model_name
        rows, dice, ways = rows_of(spec), np.random.default_rng(0), {}
        state = weights.random_state(spec, 0, DEVICE)
        models = {
            name: families.build(spec, state, dtype, DEVICE, attention.resolve(name, DEVICE, dtype)) for name in names
        }
        del state
        floor = limits.measure(spec, dtype, DEVICE, rows).gemm_floor
        with tempfile.TemporaryDirectory() as folder:
            for load in LOADS:
                lengths = getattr(workload, load)(2 * rows, dice)
                work = workload.made_up(load, lengths, Path(folder), 1022, reading=families.family_of(spec).READING)
                for name, model in models.items():
                    ways[load, name] = modes.packed(model, work, rows)[0]
                    ways[load, name].run()
            times = {key: [] for key in ways}
            for _ in range(given.rounds):
                for key, way in ways.items():
                    times[key].append(seconds_of(way.run))
        for (load, name), way in ways.items():
            seconds, first = (float(np.median(times[load, each])) for each in (name, names[0]))
            rate = way.used / seconds
            print(
                f"| {spec.name} | {load} | {name} | {rate:,.0f} | {rate / floor:.3f} | {first / seconds:.2f} |",
                flush=True,
            )
        del models, model, ways, way
        freed()


if __name__ == "__main__":
    main()
