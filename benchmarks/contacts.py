"""Contact maps on this machine: proteins a second with random weights of a model, and errors with the real 8M weights.

    python benchmarks/contacts.py [--model 650M] [--dtypes fp16,fp32] [--old SRC] [--device cuda]

The rate is of whole runs of `embed --emit contacts` on natural lengths: the difference of two runs of many and of few
proteins, so that what a run costs at its start is not in it. `--old` times the package in another source tree too, with
fewer proteins. Errors are of probabilities beside fair-esm, one protein at a time in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from virnucpro_cli.benchmark import workload
from virnucpro_cli.fasta import index, open_sources
from virnucpro_cli.model import families, locate, weights
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation.fair_esm import Reference, encode

HERE = Path(__file__).resolve().parent.parent


def written(folder, spec):
    """A checkpoint with random weights and heads, in fp16 to save time."""
    folder.mkdir()
    state = weights.random_state(spec) | weights.random_heads(spec)
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {
        "model_type": "esm", "num_hidden_layers": spec.layers, "hidden_size": spec.hidden, "token_dropout": True,
        "num_attention_heads": spec.heads, "position_embedding_type": "rotary", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def fasta_of(path, count):
    lengths = np.minimum(workload.natural(600 * count, np.random.default_rng(0)), 1022)[:count]
    dice = np.random.default_rng(1)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    path.write_text("".join(f">p{i}\n{''.join(dice.choice(letters, n))}\n" for i, n in enumerate(lengths)))
    return len(lengths)


def embedded(source, fasta, output, model, *options):
    """The report of a run by the package in a source tree."""
    command = [
        sys.executable, "-m", "virnucpro_cli", "embed", str(fasta), "-o", str(output), "--model", str(model),
        "--emit", "contacts", "--overwrite", "--quiet", "--report", f"{output}.json", *options,
    ]  # fmt: skip
    path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return json.loads(Path(f"{output}.json").read_text())


def rate(source, folder, model, few, many, *options):
    """Proteins a second."""
    seconds, counts = [], []
    for count in (few, many):
        counts.append(fasta_of(folder / "in.fasta", count))
        report = embedded(source, folder / "in.fasta", folder / "out.h5", model, *options)
        seconds.append(report["seconds"]["contacts"])
    return (counts[1] - counts[0]) / (seconds[1] - seconds[0])


def errors(folder, device, dtype):
    """Differences of every probability of the viral example from fair-esm's, and the share of the top L that stays."""
    fasta, output = HERE / "examples" / "viral_proteins.fasta", folder / "viral.h5"
    embedded(HERE / "src", fasta, output, "demo", "--device", device, "--dtype", dtype, "--store-dtype", "fp32")
    spec, state, _ = weights.load(locate.verified(locate.fetch("demo", print)))
    exact_arithmetic()
    reference, worst, relative, kept = Reference(spec, state, device).model, [], [], []
    table = index(open_sources((str(fasta),), folder))
    with read_embeddings(output) as file, torch.no_grad():
        for row in range(len(file)):
            (sequence,) = (text.decode()[:1022] for text in table.sequences(row, row + 1))
            tokens = torch.tensor([encode(sequence)], device=device)
            theirs, ours = reference.predict_contacts(tokens)[0].cpu().numpy(), file.contacts(row)
            worst.append(np.abs(ours - theirs).max())
            relative.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            pairs = np.triu_indices(len(sequence), 6)
            top = [set(np.argsort(-each[pairs])[: len(sequence)]) for each in (ours, theirs)]
            kept.append(len(top[0] & top[1]) / len(sequence))
    return max(worst), float(np.median(relative)), min(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="650M")
    parser.add_argument("--dtypes", default="fp16,fp32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--old", type=Path)
    parser.add_argument("--many", type=int, default=800)
    given = parser.parse_args()
    spec = families.by_name(given.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder / "model", spec)
        print(f"| {given.model}, natural lengths | proteins/s |\n|---|---|", flush=True)
        if given.old:
            found = rate(given.old, folder, folder / "model", 10, 10 + given.many // 10, "--device", given.device)
            print(f"| old, fp32 | {found:.1f} |", flush=True)
        for dtype in given.dtypes.split(","):
            options = ("--device", given.device, "--dtype", dtype)
            found = rate(HERE / "src", folder, folder / "model", given.many // 10, given.many, *options)
            print(f"| {dtype} | {found:.1f} |", flush=True)
        print("\nReal 8M weights:\n\n| dtype | worst probability | median relative L2 | least share of top L kept |")
        print("|---|---|---|---|")
        for dtype in given.dtypes.split(","):
            worst, relative, kept = errors(folder, given.device, dtype)
            print(f"| {dtype} | {worst:.1e} | {relative:.1e} | {kept:.3f} |", flush=True)


if __name__ == "__main__":
    main()
