"""An architecture as data, a family of them, and the names that tensors have here whatever the checkpoint.

Commands that compute nothing read this, too: PyTorch is imported by what needs it.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]
"""Tensors under the names that their family has here, whatever the checkpoint: fair-esm's, for ESM C transformers'."""
Shapes = dict[str, tuple[int, ...]]
Names = tuple[tuple[re.Pattern[str], str], ...]
INV_FREQ = "layers.0.self_attn.rot_emb.inv_freq"
CONTACT_HEAD, LM_HEAD = "contact_head.regression", "lm_head"
DECODER = f"{LM_HEAD}.decoder.weight"

VOCABULARY = 33
LAYER_NORM_EPS = 1e-5
"""fair-esm's ESM1bLayerNorm. HuggingFace's EsmConfig defaults to 1e-12, which only its config.json corrects."""


@dataclass(frozen=True)
class ModelSpec:
    """One architecture. heads divide hidden.

    longest: residues that it can take at most, None if there is no limit. inner: width inside a layer's second half,
    None if it follows from hidden.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    family: str = "esm2"
    longest: int | None = None
    inner: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def size(self) -> str:
        """Layers and width in words, for reports."""
        return f"{self.layers} layers of {self.hidden}"

    @property
    def exact_inv_freq(self) -> "torch.Tensor":
        """`1 / 10000^(2i / head_dim)`, float32 [head_dim / 2]: the rotary frequencies as they are meant."""
        import torch

        return 1.0 / 10000.0 ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)


DEMO = ModelSpec("demo", 6, 320, 20)


class Licence(NamedTuple):
    """The terms of published weights. url: where they stand, if the name alone does not say it.

    to_accept: whether they bind whoever downloads: then nothing is fetched before they are accepted.
    """

    name: str
    url: str = ""
    to_accept: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.url})" if self.url else self.name


MIT, APACHE = Licence("MIT"), Licence("Apache-2.0")


def positions_of(longest: int) -> int:
    """Rows of a table of learned positions: its residues, their first and last token, and two that are never read."""
    return longest + 4


class Family(Protocol):
    """A model family as its file defines it; names and signs of its models are its row in `families.TABLE`.

    What a family does not say is as it is here.
    HUB_FILES: by full name, the file of weights in a repository that has not HuggingFace's layout.
    SETTINGS: fields of a spec, and the words for each in config.json or in the settings of a fair-esm file.
    CONFIG: further values that config.json must have, beside those of the row and in the same form.
    NAMES, HEAD_NAMES: patterns of tensors of the encoder and of heads in checkpoints, and their names here.
    LEFT_OUT: tensors that are known and not used.
    JOINT: words of matrices that stand in one tensor in some layouts, one below the other, by the word of that tensor.
    READING, NUCLEOTIDES: how it reads proteins, and nucleotides, or None.
    TOKENIZER: the file beside the weights that joins letters to tokens, and the SHA-256 of the published one, or None.
    STEPS: the module of `kernels` with its steps, if they are not those of a backend.
    HEAD_DIM: width of a head in published sizes; a file without configuration does not say it.
    FP8: whether its products may be in 8 bit.
    PEERS: whether the peers of the benchmark have this network.
    """

    TITLE: str
    HUB_FILES: dict[str, str] = {}
    SETTINGS: dict[str, tuple[str, ...]]
    CONFIG: dict[str, tuple[Any, Any]] = {}
    NAMES: Names
    HEAD_NAMES: Names = ()
    LEFT_OUT: re.Pattern[str]
    JOINT: dict[str, tuple[str, ...]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    READING: Reading | None = None
    NUCLEOTIDES: Reading | None = None
    TOKENIZER: tuple[str, str] | None = None
    STEPS: str | None = None
    HEAD_DIM: int = 64
    FP8: bool = False
    PEERS: bool = False

    def repository(self, spec: ModelSpec) -> str:
        """The published weights on HuggingFace."""

    def url(self, spec: ModelSpec) -> str | None:
        """The published weights as a fair-esm file, or None."""
        return None

    def licence(self, spec: ModelSpec) -> Licence:
        """The licence of the published weights."""
        return MIT

    def told_sizes(self, state: State) -> dict[str, int]:
        """Fields of a spec that its tensors tell, [...] under the names here, beside layers and hidden.

        They are the heads by the width of the embedding [V, D], and the inner width by layer 0's last matrix [D, F].
        """
        sizes = {"heads": state["embed_tokens.weight"].shape[-1] // self.HEAD_DIM}
        if (down := state.get("layers.0.mlp.down_proj.weight")) is not None:
            sizes["inner"] = down.shape[-1]
        return sizes

    def shapes(self, spec: ModelSpec) -> Shapes:
        """Every tensor of the encoder, with its shape."""

    def head_shapes(self, spec: ModelSpec) -> dict[str, Shapes]:
        """Every tensor of each head that is used, with its shape."""
        return {}

    def settle(self, state: State, spec: ModelSpec) -> list[str]:
        """Put `INV_FREQ`, float32 [Dh / 2], into the state, and whatever else a checkpoint leaves to its reader.

        Joint matrices [n D, D] and biases are split into those here. Returns notes.
        """
        for name in [*state]:
            pieces = pieces_of(name, self.JOINT)
            if len(pieces) > 1:
                state |= zip(pieces, state.pop(name).chunk(len(pieces)), strict=False)
        state[INV_FREQ] = spec.exact_inv_freq
        return []

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> Any:
        """The weights of the packed forward, as `packed.Parts`: float32 [...] on the device."""


def name_in(names: Names, name: str) -> str | None:
    """The name here of a tensor of a checkpoint, None if no pattern is its."""
    return next((match.expand(to) for pattern, to in names if (match := pattern.fullmatch(name))), None)


def pieces_of(name: str, joint: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the tensors that the tensor of this name holds, one below the other, by a family's JOINT."""
    *place, word, kind = name.split(".")
    return tuple(".".join([*place, each, kind]) for each in joint.get(word, (word,)))


def check_longest(spec: ModelSpec, residues: int) -> None:
    """Raise UserError if the model has fewer positions than a protein of so many residues needs."""
    if spec.longest is not None and residues > spec.longest:
        raise UserError(
            f"{spec.name} takes at most {spec.longest:,} residues, and --max-residues is {residues:,}.",
            f"Give --max-residues {spec.longest} or less; --long window embeds longer proteins by windows.",
        )


def stream_dtype(dtype: "torch.dtype") -> "torch.dtype":
    """The dtype of the residual stream and of attention in a forward of this dtype: fp16 for fp8, else the same."""
    import torch

    return torch.float16 if dtype == torch.float8_e4m3fn else dtype


def resolved_layers(requested: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """Layer numbers 0..L of what --layers asks for: negatives count from the end (-1 is L), order is kept.

    Of duplicates the last is kept. Raises UserError for a number outside -(L + 1)..L.
    """
    count = spec.layers + 1
    for layer in requested:
        if not -count <= layer < count:
            refusal = f"--layers: layer {layer} is outside {-count}..{spec.layers} of {spec.name}."
            raise UserError(refusal, "0 is the embedding, -1 the last layer.")
    return tuple(dict.fromkeys(layer % count for layer in reversed(requested)))[::-1]
