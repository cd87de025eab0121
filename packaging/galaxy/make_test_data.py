"""Make virnucpro/test-data anew: a tiny ESM-2 and a head, both with random weights, and inputs out of examples."""

import gzip
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.model.weights import random_heads, random_state

HERE = Path(__file__).parent
DATA, EXAMPLES = HERE / "virnucpro" / "test-data", HERE.parent.parent / "examples"
TINY = ModelSpec("tiny", 2, 32, 4)
DNABERT_WIDTH, HIDDEN = 768, 8


def written(state: dict[str, torch.Tensor], path: Path, notes: dict[str, str]) -> None:
    """A safetensors file that all may read."""
    save_file(state, path, notes)
    path.chmod(0o644)


def tiny_model(folder: Path) -> None:
    """A HuggingFace directory."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in (random_state(TINY) | random_heads(TINY)).items()}
    written(state, folder / "model.safetensors", {})
    config = {
        "model_type": "esm", "num_hidden_layers": TINY.layers, "hidden_size": TINY.hidden,
        "num_attention_heads": TINY.heads, "position_embedding_type": "rotary", "token_dropout": True,
        "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def head(path: Path) -> None:
    """A head over rows of DNABERT-S and of the tiny model."""
    features, dice = DNABERT_WIDTH + TINY.hidden, torch.Generator().manual_seed(0)
    shapes = {"hidden_layer.weight": (HIDDEN, features), "output_layer.weight": (2, HIDDEN)}
    state = {name: torch.randn(shape, generator=dice) * shape[1] ** -0.5 for name, shape in shapes.items()}
    state |= {"hidden_layer.bias": torch.zeros(HIDDEN), "output_layer.bias": torch.zeros(2)}
    state |= {f"bn1.{name}": torch.ones(HIDDEN) for name in ("weight", "running_var")}
    state |= {f"bn1.{name}": torch.zeros(HIDDEN) for name in ("bias", "running_mean")}
    written(state, path, {"chunk": "500"})


def records(path: Path) -> list[tuple[str, str]]:
    """Headers and sequences."""
    found = [text.partition("\n") for text in path.read_text().split(">")[1:]]
    return [(header, lines.replace("\n", "")) for header, _, lines in found]


def fasta(each: list[tuple[str, str]]) -> str:
    return "".join(f">{header}\n{sequence}\n" for header, sequence in each)


def main() -> None:
    tiny_model(DATA / "tiny")
    head(DATA / "head.safetensors")
    proteins, contigs = records(EXAMPLES / "viral_proteins.fasta"), records(EXAMPLES / "contigs.fna")
    longest = min((each for each in proteins if len(each[1]) > 1022), key=lambda each: len(each[1]))
    (DATA / "proteins.fasta").write_text(fasta([*proteins[:3], longest]))
    with gzip.GzipFile(DATA / "with_an_empty_record.fasta.gz", "wb", mtime=0) as file:
        file.write(fasta([proteins[0], ("nothing here", ""), proteins[1]]).encode())
    (DATA / "contigs.fasta").write_text(fasta(contigs))
    reads = [("read_1", contigs[0][1][:300]), ("read_2", contigs[0][1][300:600])]
    (DATA / "reads.fastq").write_text("".join(f"@{name}\n{bases}\n+\n{'I' * len(bases)}\n" for name, bases in reads))


if __name__ == "__main__":
    main()
