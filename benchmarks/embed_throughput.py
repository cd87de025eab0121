"""Tokens/s of whole `embed` runs (FASTA to closed file) against the bare forward and pooling on the same packs.

    python benchmarks/embed_throughput.py --models demo,random:650M --fasta tests/data/uniprot_5k.fasta.gz

Prints one table; the last line of stdout is JSON. Start-up (imports, reading weights) is excluded on both sides.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli import attention, embed, fasta, runner
from virnucpro_cli.collate import VarlenCollator
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.packing import first_fit_decreasing
from virnucpro_cli.policies import decide


def bare_forward(config: EmbedConfig, rounds: int) -> tuple[list[float], int, int, float]:
    """Seconds of forward and pooling over all packs, batches already on the device; tokens; token budget; FLOP."""
    device = runner.resolve_device(config.device)
    dtype = runner.resolve_dtype(config.dtype, device)
    exact_arithmetic()
    spec, state, _ = weights.load(locate.fetch(config.model, print))
    model = ESM2(spec, state, dtype, device, attention.resolve(config.attention, device, dtype)[1])
    del state
    table = fasta.index(fasta.open_sources(config.inputs, Path(tempfile.gettempdir())))
    work = decide(table, config)
    budget = runner.auto_token_budget(device, spec.hidden, spec.parameters * dtype.itemsize)
    plan = first_fit_decreasing(work.segments.length, budget)
    collator = VarlenCollator(table, work.segments, work.embedded, plan, device.type == "cuda")
    batches = [collator(pack).to(device) for pack in range(len(plan))]
    compute = partial(embed._compute, model, (spec.layers,), config)
    compute(batches[0])
    seconds = []
    for _ in range(rounds):
        _synchronize(device)
        started = time.perf_counter()
        for batch in batches:
            compute(batch)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    lengths = work.segments.length.astype(np.float64) + 2
    flop = spec.flops(float(plan.rung.sum()), float((lengths**2).sum()), spec.layers)
    return seconds, int(plan.tokens.sum()), budget, flop


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fragments(source: str, folder: Path, seed: int = 0) -> str:
    """Fragments of 60-165 residues cut from the records of `source`."""
    table = fasta.index(fasta.open_sources([source], folder))
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(b"????LAGVSERTIDPKQNFYMHWCXBUZO.-??", np.uint8)
    path = folder / "fragments.fasta"
    with open(path, "wb") as out:
        for record, ids in enumerate(table.token_ids(np.arange(len(table)))):
            at, part = 0, 0
            while at < len(ids):
                size = int(generator.integers(60, 166))
                text = letters[np.frombuffer(ids[at : at + size], np.uint8)].tobytes()
                if len(text) >= 60:
                    out.write(b">%d_%d\n%s\n" % (record, part, text))
                at, part = at + size, part + 1
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,random:650M")
    parser.add_argument("--fasta", default="tests/data/uniprot_5k.fasta.gz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lengths", default="natural,fragments")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for lengths in arguments.lengths.split(","):
            path = arguments.fasta if lengths == "natural" else fragments(arguments.fasta, folder)
            for model in arguments.models.split(","):
                config = EmbedConfig(
                    inputs=(path,),
                    output=str(folder / "out.h5"),
                    model=model,
                    device=arguments.device,
                    dtype=arguments.dtype,
                    quiet=True,
                )
                bare, tokens, budget, flop = bare_forward(config, arguments.rounds)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                whole, report = [], None
                for i in range(arguments.rounds):
                    output = folder / f"{lengths}-{model.replace(':', '-')}-{i}.h5"
                    report = embed.embed_fasta(
                        path, str(output), model=model, device=arguments.device, dtype=arguments.dtype
                    )
                    # "finish" and "write" lie inside or behind these; indexing and planning count, reading weights does not
                    whole.append(sum(report.seconds[stage] for stage in ("index", "plan", "forward")))
                    output.unlink()
                assert report is not None
                row = {
                    "lengths": lengths, "model": model, "budget": budget, "tokens": tokens, "density": report.packing["density"],
                    "forward_tokens_s": tokens / statistics.median(bare), "embed_tokens_s": tokens / statistics.median(whole),
                    "ratio": statistics.median(bare) / statistics.median(whole), "forward_flop_s": flop / statistics.median(bare), "spread": max(bare) / min(bare) - 1,
                    "seconds": report.seconds, "device": report.environment["device"],
                }  # fmt: skip
                rows.append(row)
                print(f"{lengths:10} {model:14} budget {budget:6} density {row['density']:.4f} "
                      f"forward {row['forward_tokens_s']:12,.0f} tok/s  embed {row['embed_tokens_s']:12,.0f} tok/s  ratio {row['ratio']:.3f}  {row['forward_flop_s']:.2e} FLOP/s", flush=True)  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
