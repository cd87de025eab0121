"""ESM C in fused kernels on this GPU: speed beside its GEMM floor, plain steps and transformers; noise; the same bits.

    python benchmarks/esmc.py [--models esmc-300m,esmc-600m,esmc-6b] [--seconds 4] [--old SRC --beside 650M]

Random weights, packs of one budget, mean pooling, interleaved rounds, median. `--old` times an ESM-2 by the package in
another source tree and by this one in turn (old, new, new, old), in processes of their own, and compares their bits.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli.benchmark import limits, modes, workload
from virnucpro_cli.engine import devices
from virnucpro_cli.model import attention, families, weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import exact_arithmetic

HERE = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
LOADS = ("natural", "fragments")
PADDED = 32768
"""Tokens of a padded batch of transformers."""


def seconds_of(call):
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def rows_of(spec):
    """The token budget that a run would choose."""
    return devices.auto_token_budget("cuda", devices.free_memory(DEVICE), spec.hidden, 0)


def freed():
    gc.collect()
    torch.cuda.empty_cache()


def models_of(spec, state, dtype):
    """Fused steps; plain steps and PyTorch's attention; plain steps around ours, as before they were fused."""
    ours, torchs = (attention.resolve(name, DEVICE, dtype) for name in ("triton", "torch_varlen"))
    fused, plain = (build(spec, state, dtype, DEVICE, each) for each in (ours, torchs))
    return {"fused": fused, "plain": plain, "plain, our attention": plain.with_attention(ours.attention)}


def speed(spec, state, dtype, seconds):
    """A row of figures for each load."""
    rows, packs = rows_of(spec), 2 if spec.hidden > 2000 else 4
    models = models_of(spec, state, dtype)
    peer = transformers_run(spec, dtype)
    found, dice = [], np.random.default_rng(0)
    for load in LOADS:
        with tempfile.TemporaryDirectory() as folder:
            work = workload.made_up(load, getattr(workload, load)(packs * rows, dice), Path(folder), 1022)
            ways = {name: modes.packed(model, work, rows)[0] for name, model in models.items()}
            for way in ways.values():
                way.run()
            floor = limits.measure(spec, dtype, DEVICE, rows).gemm_floor
            times = {name: [] for name in ways}
            for _ in range(max(3, int(seconds / 4 / seconds_of(ways["fused"].run)))):
                for name, way in ways.items():
                    times[name].append(seconds_of(way.run))
            rates = {name: way.used / float(np.median(times[name])) for name, way in ways.items()}
            row = {"model": spec.name, "load": load, "rows": rows, "GEMM floor": floor, **rates}
            if peer:
                row["transformers"] = peer_rate(peer, work)
                row["x transformers"] = rates["fused"] / row["transformers"]
            row["of the floor"] = rates["fused"] / floor
            split = limits.breakdown(ways["fused"].run, DEVICE)
            total = sum(split.values())
            row |= {f"% {kind}": 100 * each / total for kind, each in split.items()}
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def transformers_run(spec, dtype):
    """transformers' own class, sdpa, padded batches sorted by length, means on the device."""
    try:
        from transformers import EsmcConfig, EsmcModel
    except ImportError as error:
        print(f"transformers: {error}")
        return None
    from virnucpro_cli.benchmark.peers import _huggingface

    config = EsmcConfig(
        hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
        intermediate_size=spec.inner, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or the 6B would be there in fp32 first
    try:
        return _huggingface(lambda config, **_: EsmcModel(config), config, DEVICE, dtype, PADDED)
    finally:
        torch.set_default_dtype(before)


def peer_rate(run, work):
    ids = [[0, *text, 2] for text in work.token_ids()]
    run(ids[:8])
    return sum(map(len, ids)) / min(seconds_of(lambda: run(ids)) for _ in range(2))


def peer_alone(spec):
    """Tokens/s of the transformers that is installed, by load: another version of it may be slower or faster."""
    import transformers

    run, dice, rates = transformers_run(spec, torch.float16), np.random.default_rng(0), {}
    for load in LOADS:
        with tempfile.TemporaryDirectory() as folder:
            lengths = getattr(workload, load)((1 if spec.hidden > 2000 else 4) * PADDED, dice)
            rates[load] = f"{peer_rate(run, workload.made_up(load, lengths, Path(folder), 1022)):,.0f}"
    print(f"transformers {transformers.__version__}, {spec.name}, tokens/s:", rates, flush=True)


def pack_of(spec, sequences, rows):
    from packs import one_pack

    with tempfile.TemporaryDirectory() as folder:
        return one_pack(Path(folder), sequences, rows, families.family_of(spec).READING)


def noise(spec, state):
    """Relative L2 of the last layer against plain steps in fp32, by dtype: fused steps, and plain ones as the floor."""
    from packs import embeddings, of_segment, random_protein

    dice, lengths, last = random.Random(0), np.random.default_rng(1), spec.layers
    sizes = np.minimum(workload.natural(14000, lengths), 1022).tolist()
    batch = pack_of(spec, [random_protein(size, dice) for size in sizes], 16384)

    def rows(model):
        found = embeddings(model, batch, (last,))
        found = [of_segment(found, batch, i) for i in range(len(sizes))]
        return {kind: [each[kind, last].double().cpu() for each in found] for kind in ("mean", "residue")}

    exact = rows(build(spec, state, torch.float32, DEVICE, attention.resolve("auto", DEVICE, torch.float32)))
    freed()
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        errors = {}
        for name, model in models_of(spec, state, dtype).items():
            there = rows(model)
            errors[name] = {
                kind: np.array(
                    [float((a - b).norm() / b.norm()) for a, b in zip(there[kind], exact[kind], strict=True)]
                )
                for kind in exact
            }
        del model
        freed()
        for kind in exact:
            fused, plain = errors["fused"][kind], errors["plain"][kind]
            found.append({
                "model": spec.name, "dtype": attention.describe(dtype), "rows": kind, "median, fused": np.median(fused),
                "median, plain": np.median(plain), "worst, fused": fused.max(), "worst, plain": plain.max(),
                "median ratio": np.median(fused) / np.median(plain), "worst ratio": fused.max() / plain.max(),
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def same_bits(spec, state):
    """Buckets in which a protein among strangers has the bits that it has alone, of all, by dtype."""
    from packs import among_strangers, embeddings, of_segment, random_protein
    from virnucpro_cli.plan.packing import buckets

    generator, found, layers = random.Random(1), {}, (0, 1, spec.layers // 2, spec.layers)
    ladder = buckets(rows_of(spec))
    probes = [random_protein(n, generator) for n in (1, 33, 64, 130, 351)]
    for dtype in (torch.float16, torch.bfloat16):
        model = build(spec, state, dtype, DEVICE, attention.resolve("triton", DEVICE, dtype))
        alone, same = [], 0
        for probe in probes:
            batch = pack_of(spec, [probe], 1024)
            alone.append(of_segment(embeddings(model, batch, layers), batch, 0))
        for rows in ladder:
            sequences, at = among_strangers(probes, rows, generator)
            batch = pack_of(spec, sequences, rows)
            there = embeddings(model, batch, layers)
            pieces = [of_segment(there, batch, place) for place in at]
            same += all(torch.equal(one[key], two[key]) for one, two in zip(alone, pieces, strict=True) for key in one)
        found[attention.describe(dtype)] = f"{same} of {len(ladder)}"
        del model
        freed()
    print(spec.name, "buckets with the same bits:", found, flush=True)
    return found


def forward(name, seconds):
    """Tokens/s of each load, and a hash of its rows; what an older package can do as well."""
    spec = families.by_name(name)
    state = weights.random_state(spec, 0, DEVICE)
    model = build(spec, state, torch.float16, DEVICE, attention.resolve("triton", DEVICE, torch.float16))
    dice, found = np.random.default_rng(0), {}
    for load in LOADS:
        with tempfile.TemporaryDirectory() as folder:
            work = workload.made_up(load, getattr(workload, load)(4 * PADDED, dice), Path(folder), 1022)
            way = modes.packed(model, work, PADDED)[0]
            bits = hashlib.sha256(way.run().cpu().numpy().tobytes()).hexdigest()
            warm = time.monotonic() + 1.5
            while time.monotonic() < warm:
                way.run()
            times = [seconds_of(way.run) for _ in range(max(5, int(seconds / seconds_of(way.run))))]
            found[load] = {"tokens/s": way.used / float(np.median(times)), "bits": bits}
    print(json.dumps(found))


def beside(old, name, seconds):
    runs = []
    for source in (old, HERE / "src", HERE / "src", old):
        paths = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--forward", name, "--seconds", str(seconds)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    for load in LOADS:
        before, after = (np.mean([runs[i][load]["tokens/s"] for i in pair]) for pair in ((0, 3), (1, 2)))
        each = ", ".join(f"{run[load]['tokens/s']:,.0f}" for run in runs)
        print(
            f"{name} {load}: old {before:,.0f} new {after:,.0f} tokens/s, new/old {after / before:.4f} ({each}), bits",
            "the same" if len({run[load]["bits"] for run in runs}) == 1 else "DIFFERENT", flush=True,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="esmc-300m,esmc-600m,esmc-6b")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--beside", default="650M")
    parser.add_argument("--forward")
    parser.add_argument("--peer", action="store_true", help="only transformers")
    options = parser.parse_args()
    exact_arithmetic()
    if options.forward:
        return forward(options.forward, options.seconds)
    if options.peer:
        for name in options.models.split(","):
            peer_alone(families.by_name(name))
            freed()
        return None
    sys.path.insert(0, str(HERE / "tests"))
    from virnucpro_cli import report

    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for dtype in (torch.float16, torch.bfloat16):
        print(
            f"trial of {dtype}: {seconds_of(lambda d=dtype: attention.resolve('triton', DEVICE, d)):.1f} s", flush=True
        )
    if options.old:
        beside(options.old, options.beside, options.seconds)
    tables = {"Speed, tokens/s (fp16)": [], "Relative L2 against fp32, last layer": [], "Same bits": []}
    for name in filter(None, options.models.split(",")):
        spec = families.by_name(name)
        state = weights.random_state(spec, 0, DEVICE)
        tables["Speed, tokens/s (fp16)"] += speed(spec, state, torch.float16, options.seconds)
        freed()
        tables["Relative L2 against fp32, last layer"] += noise(spec, state)
        tables["Same bits"].append({"model": name, **same_bits(spec, state)})
        del state
        freed()
    out = report.console(False)
    for title, rows in tables.items():
        if rows:
            out.print(report.rows_table(title, rows))


if __name__ == "__main__":
    main()
