"""Whole `embed` runs on 1, 2 ... GPUs of this host: rates, tails, use by worker, the same bits, a worker killed midway.

    python benchmarks/scaling.py [--models 650M,3B] [--gpus 1,2] [--natural 20000] [--fragments 200000] [--no-kill]
                                 [--ray [--no-gpu-driver]] [--residue]

Random weights, as files. Efficiency: the rate over that of one GPU times their number, both of the forward stage (from
the first worker that is ready to the last byte written), which leaves out start-up.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from virnucpro_cli import report
from virnucpro_cli.benchmark import workload
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.model import families, weights


def write_model(spec, folder):
    folder.mkdir()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = weights.random_state(spec, 0, device)
    save_file({key: each.half().cpu() for key, each in state.items()}, folder / "model.safetensors")
    config = {
        "model_type": "esm", "num_hidden_layers": spec.layers, "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "position_embedding_type": "rotary", "token_dropout": True, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    del state
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder


def write_fasta(load, count, folder):
    dice = np.random.default_rng(0)
    lengths = getattr(workload, load)(600 * count, dice)[:count]
    assert len(lengths) == count
    letters = np.frombuffer(workload.RESIDUES, np.uint8)
    return write_texts(folder / f"{load}.fasta", [dice.choice(letters, n).tobytes() for n in lengths.tolist()])


ENGINES = {
    "local": [],
    "Ray": ["--engine", "ray"],
    "Ray, driver without GPU": ["--engine", "ray", "--ray-address", "auto"],
}


def start(path, output, model, gpus, engine, pool):
    """A run on that many GPUs (or processes of a CPU). A driver without a GPU sees none; the cluster here has them."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if "without" in engine else {})
    numbers = ":" + ",".join(map(str, range(gpus))) if engine == "local" else ""
    device = ["--device", f"cuda{numbers}" if torch.cuda.is_available() else "cpu"]
    return subprocess.Popen(
        [
            sys.executable, "-m", "virnucpro_cli", "embed", str(path), "-o", str(output), "--model", str(model),
            *device, "--workers", str(gpus), *ENGINES[engine], "--pool", pool,
            "--report", str(output.with_suffix(".json")),
        ], stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@contextmanager
def cluster(engine):
    """A Ray cluster of this host, where a driver connects to one."""
    if "without" not in engine:
        yield
        return
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "start", "--head", "--include-dashboard=false"], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run([*ray, "stop"], check=True, capture_output=True)


def ended(process, output):
    _, told = process.communicate()
    assert process.returncode == 0, told
    found = json.loads(output.with_suffix(".json").read_text())
    print(*found["notes"], sep="\n", flush=True)
    return found


def kill_one_after(process, seconds):
    time.sleep(seconds)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def same(one, other):
    """Whether two files hold the same bits in every dataset outside /run."""
    with h5py.File(one) as a, h5py.File(other) as b:
        names = []
        a.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return all(
            a[name][:].tobytes() == b[name][:].tobytes()
            if a[name].dtype != object
            else (a[name][:] == b[name][:]).all()
            for name in names
            if not name.startswith("run/")
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="650M,3B")
    parser.add_argument("--gpus", default="1,2")
    parser.add_argument("--natural", type=int, default=20_000)
    parser.add_argument("--fragments", type=int, default=200_000)
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--ray", action="store_true", help="the same with --engine ray")
    parser.add_argument("--no-gpu-driver", action="store_true", help="and by a driver that sees no GPU")
    parser.add_argument(
        "--residue", action="store_true", help="rows of residues as well; with Ray, written by driver and by actors"
    )
    options = parser.parse_args()
    out, rows, used = report.console(False), [], []
    counts = [int(count) for count in options.gpus.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loads = [(load, write_fasta(load, getattr(options, load), folder)) for load in ("natural", "fragments")]
        for model_name in options.models.split(","):
            model = write_model(families.by_name(model_name), folder / model_name)
            for load, path in loads:
                first = rate_of_one = None
                wall, found = 0.0, {}
                runs = [(count, False, "local") for count in counts]
                if options.ray:
                    runs += [(count, False, "Ray") for count in counts]
                    runs += [(count, False, "Ray, driver without GPU") for count in counts if options.no_gpu_driver]
                if load == "fragments" and not options.no_kill and max(counts) > 1:
                    runs.append((max(counts), True, "local"))
                for count, kill, engine in runs:
                    output = folder / f"{model_name}-{load}-{count}-{kill}-{engine}.h5"
                    started = time.perf_counter()
                    with cluster(engine):
                        process = start(
                            path, output, model, count, engine, "mean,residue" if options.residue else "mean"
                        )
                        if kill:
                            kill_one_after(process, wall - 0.5 * found["seconds"]["forward"])
                        found = ended(process, output)
                    wall = time.perf_counter() - started
                    first = first or output
                    rate = found["rates"]["tokens/s"]
                    rate_of_one = rate_of_one or rate / count
                    workers = found["tables"].get("Workers") or found["tables"].get("Nodes", [])
                    cpu = sum(worker["CPU seconds"] for worker in workers) / count if workers else "-"
                    how = f"{', one killed' if kill else ''}{'' if engine == 'local' else ', ' + engine}"
                    tails = [worker["idle at the end"] for worker in workers if not worker["lost"]]
                    rows.append({
                        "model": model_name, "load": load, "GPUs": f"{count}{how}", "tokens": found["counts"]["tokens"],
                        "tokens/s": rate, "efficiency": round(rate / count / rate_of_one, 3),
                        "tail, worst": f"{max(tails, default=0):.2%}",
                        "forward s": found["seconds"]["forward"], "whole run s": wall,
                        "CPU s a worker": cpu if cpu == "-" else f"{cpu:.1f}",
                        "lost": sum(bool(worker["lost"]) for worker in workers),
                        "same bits": "yes" if same(first, output) else "NO",
                    })  # fmt: skip
                    print(rows[-1], flush=True)
                    used += [
                        {"model": model_name, "load": load, "GPUs": str(count)} | worker
                        for worker in found["tables"].get("Workers", [])
                    ]
                    if output != first:
                        output.unlink()
                first.unlink()
    for title, table in (("Scaling", rows), ("Workers", used)):
        if table:
            out.print(report.rows_table(title, table))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
