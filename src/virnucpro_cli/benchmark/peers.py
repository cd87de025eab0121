"""Other tools on the same sequences, each as its users run it, with random weights of the same architecture."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from virnucpro_cli import alphabet
from virnucpro_cli.model.spec import ModelSpec

TOKS_PER_BATCH = 4096
"""The default of fair-esm's extract script."""


Run = Callable[[list[list[int]]], None]
"""Embeds token id lists (with `<cls>` and `<eos>`): the mean of the last layer of each, to the host."""


class Peer(NamedTuple):
    """make(spec, device, dtype, token_budget) gives its `Run`; fp32: whether fp32 is timed, and not the run's dtype."""

    package: str
    label: str
    fp32: bool
    make: Callable[[ModelSpec, torch.device, torch.dtype, int], Run]


def installed(names: tuple[str, ...], dtype: torch.dtype) -> tuple[list[Peer], list[str]]:
    """The peers that can be tried here in a dtype, and why others cannot."""
    there, absent = [], []
    for name in names:
        if find_spec(PEERS[name][0].package) is None:
            absent.append(f"{name}: not installed")
        else:
            there += [peer for peer in PEERS[name] if peer.fp32 or dtype != torch.float32]
    return there, absent


def _ascending(ids: list[list[int]], budget: int) -> list[list[list[int]]]:
    """Padded batches of rising length within a budget of padded tokens."""
    batches: list[list[list[int]]] = [[]]
    for one in sorted(ids, key=len):
        if batches[-1] and len(one) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(one)
    return batches


def _tensor(batch: list[list[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True, padding_value=alphabet.PAD)


def fair_esm(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Run:
    """The way of scripts/extract.py: batches of 4,096 padded tokens, the layer to the host, means there one by one."""
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    with device:
        model = ESM2(spec.layers, spec.hidden, spec.heads, alphabet=Alphabet.from_architecture("ESM-1b"))
        model = model.eval().to(dtype)

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> None:
        for batch in _ascending(ids, TOKS_PER_BATCH):
            out = model(_tensor(batch).to(device), repr_layers=[spec.layers])["representations"][spec.layers].to("cpu")
            for row, one in zip(out, batch, strict=True):
                row[1 : len(one) - 1].mean(0).clone()

    return run


def _huggingface(model_class: Any, config: Any, device: torch.device, dtype: torch.dtype, token_budget: int) -> Run:
    """Sorted padded batches within our own token budget, the masked mean on the device."""
    with device:
        model = model_class(config, add_pooling_layer=False).eval().to(dtype)

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> None:
        for batch in reversed(_ascending(ids, token_budget)):
            tokens = _tensor(batch).to(device)
            mask = tokens != alphabet.PAD
            out = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            ((out * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu()

    return run


def transformers_sdpa(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Run:
    from virnucpro_cli.validation.transformers_esm import EsmModel, config_of

    return _huggingface(EsmModel, config_of(spec, "sdpa"), device, dtype, token_budget)


def faesm(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Run:
    from faesm.esm import FAEsmModel

    from virnucpro_cli.validation.transformers_esm import config_of

    config = config_of(spec, "sdpa")
    config.use_fa = True
    return _huggingface(FAEsmModel, config, device, dtype, token_budget)


def esm_efficient(spec: ModelSpec, device: torch.device, dtype: torch.dtype, token_budget: int) -> Run:
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


PEERS = {
    "fair-esm": (
        Peer("esm", "fair-esm extract, fp32", True, fair_esm),
        Peer("esm", "fair-esm extract, half", False, fair_esm),
    ),
    "transformers": (
        Peer("transformers", "transformers sdpa, sorted", False, transformers_sdpa),
        Peer("transformers", "transformers sdpa, sorted, fp32", True, transformers_sdpa),
    ),
    "esm-efficient": (Peer("esme", "esm-efficient", False, esm_efficient),),
    "faesm": (Peer("faesm", "FAESM", False, faesm),),
}
