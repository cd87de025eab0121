"""The forward of this build and of an older one, in turn on one GPU, beside the GEMM floor of the same run.

    python benchmarks/forwards.py OLD_SOURCE [--models 8M,35M,150M,650M,3B] [--dtype fp16] [--rounds 7] [--profile 12]

OLD_SOURCE: the `src` folder of the older checkout. Each build is a process of its own with the same packs: four full
ones of natural lengths and four of fragments, `mean` of the last layer, random weights. Rates are medians.
`--profile` prints the kernels that take most of this build's time, in microseconds a pack.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOADS = ("natural", "fragments")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}


def serve(name: str, dtype_name: str) -> None:
    """Time a load, or profile it, for each line that comes; the first line that goes out says that all is ready."""
    import numpy as np
    import torch

    def module(*names: str) -> Any:
        """The first of these that the build has: older ones lay elsewhere."""
        for each in names:
            try:
                return importlib.import_module(f"virnucpro_cli.{each}")
            except ModuleNotFoundError:
                continue
        raise ImportError(names[0])

    limits, modes, workload = (module(f"benchmark.{of}", f"timing.{of}") for of in ("limits", "modes", "workload"))
    devices, attention = module("engine.devices", "runner"), module("model.attention", "attention")
    weights, esm2, known = module("model.weights"), module("model.esm2"), module("model.spec")
    device, dtype = torch.device("cuda", 0), getattr(torch, DTYPES[dtype_name])
    module("model.packed", "model.esm2").exact_arithmetic()
    new = importlib.util.find_spec("virnucpro_cli.model.families") is not None
    spec = module("model.families").by_name(name) if new else known.by_name(name)
    rows = devices.auto_token_budget("cuda", torch.cuda.get_device_properties(device).total_memory, spec.hidden, 0)
    make = module("model.families").build if new else esm2.ESM2
    backend = attention.resolve("triton", device, dtype)
    model = make(spec, weights.random_state(spec, 0, device), dtype, device, backend)
    ways = {}
    for load in LOADS:
        lengths = getattr(workload, load)(5 * rows, np.random.default_rng(0))
        with tempfile.TemporaryDirectory() as folder:
            work = workload.made_up(load, lengths, Path(folder), 1022)
            *_, host = modes.packed(model, work, rows)
        full = [batch.to(device) for batch in sorted(host, key=lambda batch: -batch.used)[:4]]
        ways[load] = full, sum(batch.used for batch in full)

    def forward(load: str) -> int:
        packs, used = ways[load]
        for batch in packs:
            modes.mean_of_last(model, batch)
        torch.cuda.synchronize()
        return used

    for load in LOADS:
        forward(load)
    print("ready", rows, flush=True)
    for line in sys.stdin:
        load, _, count = line.strip().partition(" ")
        if load == "floor":
            print(limits.measure(spec, dtype, device, rows).gemm_floor, flush=True)
        elif count:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                forward(load)
            kernels = sorted(found.key_averages(), key=lambda each: -each.self_device_time_total)[: int(count)]
            print(*(f"{each.key[:48]}={each.self_device_time_total / 4:.0f}x{each.count / 4:g}" for each in kernels if
                    each.self_device_time_total), sep="; ", flush=True)  # fmt: skip
        else:
            began = time.perf_counter()
            used = forward(load)
            print(used / (time.perf_counter() - began), flush=True)


class Build:
    """A process that serves."""

    def __init__(self, source: Path, name: str, dtype: str):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, __file__, "--serve", name, "--dtype", dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a build ended")
        return line.strip()

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("--models", default="8M,35M,150M,650M,3B")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--serve")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.dtype)
        return
    here = Path(__file__).resolve().parents[1] / "src"
    print("| model | load | before | now | ratio | of the GEMM floor (before) |\n|---|---|---|---|---|---|")
    for name in options.models.split(","):
        old, new = (Build(source, name, options.dtype) for source in (options.old.resolve(), here))
        for load in LOADS:
            rates: dict[Build, list[float]] = {old: [], new: []}
            for _ in range(options.rounds):
                for build in (old, new):
                    rates[build].append(float(build.ask(load)))
            floor = float(new.ask("floor"))
            before, now = (statistics.median(rates[build]) for build in (old, new))
            row = f"{before:,.0f} | {now:,.0f} | {now / before:.3f} | {now / floor:.3f} ({before / floor:.3f})"
            print(f"| {name} | {load} | {row} |", flush=True)
            if options.profile:
                print(new.ask(f"{load} {options.profile}"), flush=True)
        old.end()
        new.end()


if __name__ == "__main__":
    main()
