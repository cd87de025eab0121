"""ESM-1b and ESM-1v: ESM-2's layers after learned positions, without rotary embeddings. fair-esm is the definition.

ESM-1b has a LayerNorm before its first layer and a contact regression. ESM-1v has neither.
"""

import re
from typing import TYPE_CHECKING

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.esm2 import PREFIX, Esm2
from virnucpro_cli.model.spec import CONTACT_HEAD, INV_FREQ, ModelSpec, Shapes, State, positions_of

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.packed import Parts

POSITIONS, FIRST_NORM = "embed_positions.weight", "emb_layer_norm_before"
OFFSET = alphabet.PAD + 1
"""Row of the table of positions that the first token of a segment has."""


class Esm1(Esm2):
    """A family of models of one size with learned positions. first_norm: whether a LayerNorm follows them."""

    NAMES = (
        *Esm2.NAMES,
        (re.compile(PREFIX + r"embed_positions\.weight"), POSITIONS),
        (re.compile(PREFIX + r"embeddings\.position_embeddings\.weight"), POSITIONS),
        (re.compile(PREFIX + rf"{FIRST_NORM}\.(weight|bias)"), rf"{FIRST_NORM}.\1"),
        (re.compile(PREFIX + r"embeddings\.layer_norm\.(weight|bias)"), rf"{FIRST_NORM}.\1"),
    )
    PEERS = False

    def __init__(self, title: str, first_norm: bool):
        self.TITLE, self.first_norm = title, first_norm

    def shapes(self, spec: ModelSpec) -> Shapes:
        assert spec.longest is not None
        expected = super().shapes(spec) | {POSITIONS: (positions_of(spec.longest), spec.hidden)}
        if self.first_norm:
            expected |= {f"{FIRST_NORM}.{part}": (spec.hidden,) for part in ("weight", "bias")}
        return expected

    def head_shapes(self, spec: ModelSpec) -> dict[str, Shapes]:
        """Every tensor of each head, with its shape. A contact head in a file of ESM-1v was never trained."""
        heads = super().head_shapes(spec)
        return heads if self.first_norm else {name: each for name, each in heads.items() if name != CONTACT_HEAD}

    def settle(self, state: State, spec: ModelSpec) -> list[str]:
        """Put `INV_FREQ` of zeros, float32 [Dh / 2], into the state: they turn nothing. Returns no notes.

        The row of `<mask>` of the embedding [33, D] becomes zero, as in fair-esm: the token head sees it, too.
        Raises UserError for a checkpoint with rotary frequencies.
        """
        import torch

        if any(name.endswith("inv_freq") for name in state):
            raise UserError(
                f"The checkpoint is not {self.TITLE}: it has rotary frequencies (inv_freq), as ESM-2 has.",
                "Give the config.json that belongs to it (position_embedding_type is rotary for ESM-2).",
            )
        state[INV_FREQ] = torch.zeros(spec.head_dim // 2)
        if (table := state["embed_tokens.weight"]).shape[0] > alphabet.MASK:
            table = state["embed_tokens.weight"] = table.clone()
            table[alphabet.MASK] = 0
        return []

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> "Parts":
        """The weights of the forward, float32 [...] on the device; positions [longest + 2, D] begin at `<cls>`."""
        import torch

        parts = super().parts(spec, state, device)
        wide = {
            name: state[name].to(device, torch.float32) for name in state if name.startswith((POSITIONS, FIRST_NORM))
        }
        norm = (wide[f"{FIRST_NORM}.weight"], wide[f"{FIRST_NORM}.bias"]) if self.first_norm else None
        return parts._replace(positions=wide[POSITIONS][OFFSET:].contiguous(), first_norm=norm)


ESM1B, ESM1V = Esm1("ESM-1b", True), Esm1("ESM-1v", False)
