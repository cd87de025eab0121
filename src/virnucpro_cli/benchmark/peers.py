"""Other tools on the same sequences, each as its users run it, with random weights of the same architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from virnucpro_cli import alphabet
from virnucpro_cli.errors import in_a_line
from virnucpro_cli.model.spec import ModelSpec

TOKS_PER_BATCH = 4096
"""The default of fair-esm's extract script."""


@dataclass(frozen=True)
class Peer:
    """run(ids) embeds token id lists (with `<cls>` and `<eos>`), the mean of the last layer of each to the host."""

    name: str
    run: Callable[[list[list[int]]], None]


Make = Callable[[ModelSpec, torch.device, torch.dtype, int], Any]


def available(
    names: tuple[str, ...], spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int
) -> tuple[list[Peer], list[str]]:
    """The peers that can run here, and why the others cannot."""
    peers, absent = [], []
    for name in names:
        package, makers = PEERS[name]
        if find_spec(package) is None:
            absent.append(f"{name}: not installed")
            continue
        for label, needs, make in makers:
            if needs == "fp32" or dtype != torch.float32:
                try:
                    peers.append(
                        Peer(label, make(spec, device, torch.float32 if needs == "fp32" else dtype, token_budget))
                    )
                except Exception as error:  # of another project's code
                    absent.append(f"{label}: {in_a_line(error)}")
    return peers, absent


def _ascending(ids: list[list[int]], budget: int) -> list[list[list[int]]]:
    """Padded batches of rising length within a budget of padded tokens."""
    batches: list[list[list[int]]] = [[]]
    for one in sorted(ids, key=len):
        if batches[-1] and len(one) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(one)
    return batches


def _tensor(batch: list[list[int]]) -> torch.Tensor:
    tokens = torch.full((len(batch), max(map(len, batch))), alphabet.PAD)
    for row, ids in zip(tokens, batch, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def fair_esm(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Any:
    """As scripts/extract.py does: batches of 4,096 padded tokens, the layer to the host, the mean there, one by one."""
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    with device:
        model = (
            ESM2(spec.layers, spec.hidden, spec.heads, alphabet=Alphabet.from_architecture("ESM-1b")).eval().to(dtype)
        )

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> None:
        for batch in _ascending(ids, TOKS_PER_BATCH):
            out = model(_tensor(batch).to(device), repr_layers=[spec.layers])["representations"][spec.layers].to("cpu")
            for row, one in zip(out, batch, strict=True):
                row[1 : len(one) - 1].mean(0).clone()

    return run


def _huggingface(model: Any, device: torch.device, token_budget: int) -> Any:
    """Sorted padded batches within our own token budget, the masked mean on the device."""

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> None:
        for batch in reversed(_ascending(ids, token_budget)):
            tokens = _tensor(batch).to(device)
            mask = tokens != alphabet.PAD
            out = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            ((out * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu()

    return run


def _config(spec: ModelSpec) -> Any:
    from transformers import EsmConfig

    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=spec.hidden, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, intermediate_size=4 * spec.hidden, position_embedding_type="rotary",
        token_dropout=True, layer_norm_eps=1e-5, emb_layer_norm_before=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def transformers_sdpa(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Any:
    from transformers import EsmModel

    with device:
        return _huggingface(EsmModel(_config(spec), add_pooling_layer=False).eval().to(dtype), device, token_budget)


def faesm(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Any:
    from faesm.esm import FAEsmModel

    config = _config(spec)
    config.use_fa = True
    with device:
        return _huggingface(FAEsmModel(config, add_pooling_layer=False).eval().to(dtype), device, token_budget)


def esm_efficient(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Any:
    """Packed batches within our own token budget, in its own format."""
    from esme.esm import ESM2

    with device:
        model = ESM2(spec.layers, spec.hidden, spec.heads, dtype=dtype).eval()

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> None:
        for batch in _ascending(ids, token_budget):
            lengths = [len(one) for one in batch]
            bounds = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(device)
            tokens = torch.tensor([i for one in batch for i in one], device=device)
            out = model.forward_representation(tokens, (bounds, max(lengths)))
            torch.stack([rows[1:-1].mean(0) for rows in out.split(lengths)]).cpu()

    return run


PEERS: dict[str, tuple[str, tuple[tuple[str, str, Make], ...]]] = {
    "fair-esm": ("esm", (("fair-esm extract, fp32", "fp32", fair_esm), ("fair-esm extract, half", "own", fair_esm))),
    "transformers": (
        "transformers",
        (
            ("transformers sdpa, sorted", "own", transformers_sdpa),
            ("transformers sdpa, sorted, fp32", "fp32", transformers_sdpa),
        ),
    ),
    "esm-efficient": ("esme", (("esm-efficient", "own", esm_efficient),)),
    "faesm": ("faesm", (("FAESM", "own", faesm),)),
}
"""Name -> (package, its rows: label, fp32 or the run's own dtype, maker)."""
