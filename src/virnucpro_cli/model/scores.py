"""Scores of a protein by the model's head for tokens, from the one pass over its unmasked residues that embeds it.

The head is computed in float32 on the rows of the last layer, whatever the forward's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.alphabet import ESM, Reading
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.pooling import Pooler, mean_over_residues
from virnucpro_cli.model.spec import DECODER, LAYER_NORM_EPS, LM_HEAD, State


class TokenHead:
    """Dense, erf GELU, LayerNorm, and the token embedding as last matrix unless the head has its own.

    width: columns that are tokens, all other rows of the last matrix are none (ESM C has some).
    The definition is RobertaLMHead in fair-esm's modules.py.
    """

    def __init__(self, state: State, device: torch.device, width: int = ESM.width):
        parts = [
            f"{LM_HEAD}.{x}" for x in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias")
        ]
        names = [*parts, DECODER if DECODER in state else "embed_tokens.weight"]
        tensors = (state[name].to(device, torch.float32) for name in names)
        self.weight, self.bias, self.scale, self.shift, last_bias, last = tensors
        self.last_bias, self.last = last_bias[:width], last[:width]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [T, V] of the rows [T, D] of the last layer."""
        inner = F.gelu(F.linear(hidden.float(), self.weight, self.bias))
        inner = F.layer_norm(inner, inner.shape[-1:], self.scale, self.shift, LAYER_NORM_EPS)
        return F.linear(inner, self.last, self.last_bias)


def entropy(logits: torch.Tensor, tokens: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Entropy of each row of logits [T, V] among the 20 amino acids alone, float64 [T], in nats: at most ln 20.

    Of nucleotides it is among the four bases. tokens: int32 [T].
    """
    first = reading.first - reading.zero
    log_p = logits[:, first : first + reading.standard].double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def surprise(logits: torch.Tensor, tokens: torch.Tensor, reading: Reading) -> torch.Tensor:
    """`-log p` of each row's token (int32 [T]) by its logits [T, V], float64 [T], in nats, among all V tokens."""
    return -logits.double().log_softmax(-1).gather(1, tokens.long()[:, None] - reading.zero)[:, 0]


SCORES: dict[str, Any] = {
    "entropy": (entropy, lambda mean: mean),
    "pseudo_perplexity": (surprise, torch.exp),
}
"""By dataset of /unmasked: the number of a row that is averaged over a protein, and a function of the mean."""


class Scorer(Pooler):
    """Pools the layers that are stored, and scores the last one."""

    def __init__(
        self, kinds: tuple[str, ...], store_dtype: torch.dtype, layers: tuple[int, ...], last: int, head: TokenHead,
        names: tuple[str, ...], reading: Reading = ESM,
    ):  # fmt: skip
        super().__init__(kinds, store_dtype)
        self.layers, self.last, self.head, self.names, self.reading = layers, last, head, names, reading

    def add(self, into: Embeddings, layer: int, hidden: torch.Tensor, batch: PackedBatch) -> None:
        """Put the pools and scores of a layer's rows [T, D] of any dtype into the embeddings."""
        if layer in self.layers:
            super().add(into, layer, hidden, batch)
        if layer == self.last:
            logits = self.head(hidden)
            if "logits" in self.names:
                self._keep(into, "logits", logits.to(self.store_dtype), batch)
            for name, (of_row, of_mean) in SCORES.items():
                if name in self.names:
                    rows = of_row(logits, batch.tokens, self.reading)[:, None]
                    score = of_mean(mean_over_residues(rows, batch))[:, 0].float()
                    into.pooled["unmasked", name] = score
                    self._note_finite(into, score.isfinite())


def check_head(state: State, weights: Weights) -> None:
    """Raise UserError if the weights have no head for tokens."""
    if f"{LM_HEAD}.bias" not in state:
        raise UserError(
            f"The weights of {weights.name} have no language-model head (lm_head.* in {weights.place}), "
            "or its last matrix contradicts tie_word_embeddings of config.json.",
            "Leave --emit out, or use the published weights.",
        )
