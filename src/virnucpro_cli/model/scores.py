"""Scores of a protein by ESM-2's head for tokens, from the one pass over its unmasked residues that embeds it.

The head is computed in float32 on the rows of the last layer, whatever the forward's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.pooling import Pooler, mean_over_residues
from virnucpro_cli.model.spec import LAYER_NORM_EPS
from virnucpro_cli.model.weights import DECODER, LM_HEAD, State

AMINO_ACIDS = slice(4, 24)
"""The 20 of them, in the alphabet of 33 tokens."""


class TokenHead:
    """Dense, erf GELU, LayerNorm, and the token embedding as last matrix unless the head has its own (fair-esm modules.py, RobertaLMHead)."""

    def __init__(self, state: State, device: torch.device):
        def tensor(name: str) -> torch.Tensor:
            return state[name].to(device, torch.float32)

        parts = ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias")
        self.weight, self.bias, self.scale, self.shift, self.last_bias = (tensor(f"{LM_HEAD}.{x}") for x in parts)
        self.last = tensor(DECODER if DECODER in state else "embed_tokens.weight")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [T, 33] of the rows [T, D] of the last layer."""
        inner = F.gelu(F.linear(hidden.float(), self.weight, self.bias))
        inner = F.layer_norm(inner, inner.shape[-1:], self.scale, self.shift, LAYER_NORM_EPS)
        return F.linear(inner, self.last, self.last_bias)


def entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each row [T], in nats, among the 20 amino acids alone: at most ln 20."""
    log_p = logits[:, AMINO_ACIDS].double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def surprise(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`-log p` of each row's own token, [T], in nats, among all 33 tokens."""
    return -logits.double().log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]


SCORES: dict[str, Any] = {
    "entropy": (entropy, lambda mean: mean),
    "pseudo_perplexity": (surprise, torch.exp),
}
"""By dataset of /unmasked: what is averaged over a protein's residues, and what is made of the average."""


class Scorer(Pooler):
    """Pools the layers that are stored, and scores the last one."""

    def __init__(
        self, kinds: tuple[str, ...], store_dtype: torch.dtype, layers: tuple[int, ...], last: int, head: TokenHead,
        names: tuple[str, ...],
    ):  # fmt: skip
        super().__init__(kinds, store_dtype)
        self.layers, self.last, self.head, self.names = layers, last, head, names

    def add(self, into: Embeddings, layer: int, hidden: torch.Tensor, batch: PackedBatch) -> None:
        if layer in self.layers:
            super().add(into, layer, hidden, batch)
        if layer == self.last:
            logits = self.head(hidden)
            if "logits" in self.names:
                self._keep(into, "logits", logits.to(self.store_dtype), batch)
            for name in (name for name in SCORES if name in self.names):
                of_row, of_mean = SCORES[name]
                found = of_mean(mean_over_residues(of_row(logits, batch.tokens)[:, None], batch))[:, 0].float()
                into.pooled["unmasked", name] = found
                self._note_finite(into, found.isfinite())


def check_head(state: State, found: Weights) -> None:
    """Raise UserError if the weights have no head for tokens."""
    if f"{LM_HEAD}.bias" not in state:
        raise UserError(
            f"The weights of {found.name} have no language-model head of ESM-2 (lm_head.* in {found.place}), "
            "or its last matrix contradicts tie_word_embeddings of config.json.",
            "Use the published weights, or leave --emit out.",
        )
