"""LucaVirus: ESM-2's layers on proteins and on nucleotides, each with a row for its kind added to every token.

The authors' `LucaVirusModel` is the definition.
"""

import re
from typing import TYPE_CHECKING

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.model.esm2 import Esm2, settle_inv_freq
from virnucpro_cli.model.spec import LM_HEAD, ModelSpec, Shapes, State

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.packed import Parts

VOCABULARY = 39
PAD, CLS, EOS, MASK = 0, 2, 3, 4
TYPES = "embed_type.weight"
_PREFIX = r"(?:lucavirus\.)?(?:embeddings\.|encoder\.)?"


class LucaVirus(Esm2):
    """The family. Its licence is MIT, as ESM-2's."""

    TITLE = "LucaVirus"
    NUCLEOTIDES = Reading(
        "ATCGN", 5, CLS, PAD, EOS, MASK, "N", (("U", "T"), ("-", "N"), (".", "N")), 4, False, width=VOCABULARY
    )
    READING = Reading(
        "LAGVSERTIDPKQNFYMHWCXBUZOJ.-*", VOCABULARY + 10, VOCABULARY + CLS, VOCABULARY + PAD, VOCABULARY + EOS,
        VOCABULARY + MASK, scales_masks=False, zero=VOCABULARY, width=VOCABULARY,
    )  # fmt: skip
    """Ids of nucleotides are rows of the first half of `Parts.embedding`, and those of proteins of its second half."""
    NAMES = tuple((re.compile(_PREFIX + pattern), template) for pattern, template in (
        (r"(embed_(?:tokens|type)\.weight|layers\.\d+\.(?:self_attn\.rot_emb\.inv_freq"
         r"|(?:self_attn\.(?:[qkv]|out)_proj|fc1|fc2)\.(?:weight|bias)))", r"\1"),
        (r"layers\.(\d+)\.pre_layer_norm\.(weight|bias)", r"layers.\1.self_attn_layer_norm.\2"),
        (r"layers\.(\d+)\.post_layer_norm\.(weight|bias)", r"layers.\1.final_layer_norm.\2"),
        (r"last_layer_norm\.(weight|bias)", r"emb_layer_norm_after.\1"),
    ))  # fmt: skip
    """Names of the authors' package and of their training code, and those of fair-esm, which are the names here."""
    HEAD_NAMES = ((re.compile(r"(lm_head\..+)"), r"\1"),)
    LEFT_OUT = re.compile(
        r"(lm_head|pooler|classifier|contact_head|(hidden_layer|classifier|output|loss_fct)(_list)?)\..*"
    )
    SETTINGS = {field: words[:1] for field, words in Esm2.SETTINGS.items()}
    CONFIG = {
        "vocab_size": (VOCABULARY, VOCABULARY),
        "type_vocab_size": (2, 2),
        "no_position_embeddings": (True, True),
        "no_token_type_embeddings": (False, False),
        "use_embed_layer_norm": (False, False),
        "use_last_layer_norm": (True, True),
        "embed_scale": (1.0, 1.0),
        "mask_token_id": (MASK, MASK),
    }
    """The layer_norm_eps in config.json is not among them: the authors' class does not read it, and has 1e-5."""
    PEERS = False

    def repository(self, spec: ModelSpec) -> str:
        return f"LucaGroup/{spec.name}"

    def url(self, spec: ModelSpec) -> str | None:
        return None

    def settle(self, state: State, spec: ModelSpec) -> list[str]:
        """Make layer 0's inv_freq, float32 [Dh / 2], stand for all. Returns notes; see `settle_inv_freq`."""
        return settle_inv_freq(state, spec.exact_inv_freq, "the exact one")

    def shapes(self, spec: ModelSpec) -> Shapes:
        tables = {"embed_tokens.weight": (VOCABULARY, spec.hidden), TYPES: (2, spec.hidden)}
        return super().shapes(spec) | tables

    def head_shapes(self, spec: ModelSpec) -> dict[str, Shapes]:
        """Every tensor of the token head, with its shape; its last matrix is the token embedding."""
        return {LM_HEAD: super().head_shapes(spec)[LM_HEAD] | {"bias": (VOCABULARY,)}}

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> "Parts":
        """The weights of the forward, float32 on the device.

        The embedding [78, D] holds every token as nucleotides have it, then as proteins do. Nothing is zero or scaled.
        """
        import torch

        tokens, types = (state[name].to(device, torch.float32) for name in ("embed_tokens.weight", TYPES))
        return super().parts(spec, state, device)._replace(embedding=torch.cat([tokens + row for row in types]))


LUCAVIRUS = LucaVirus()
