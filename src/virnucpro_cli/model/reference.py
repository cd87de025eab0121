"""The oracle: fair-esm's own ESM2 class, one unpadded sequence at a time, and the plainest FASTA reader there is.

Shares no code with the fast path, so that it can judge it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import IO, Any

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2
from esm.rotary_embedding import RotaryEmbedding
from xopen import xopen

from virnucpro_cli.model.spec import ModelSpec

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"


class Reference:
    """fair-esm's model with the given state (fair-esm's names) on one device.

    dtype: fp32 is the definition. In another dtype the model is run plainly, but its rotary tables are kept in fp32
    (fair-esm's `.half()` would round them) or, for fp64, computed in fp64; that is the noise floor of the dtype.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.spec, self.device = spec, torch.device(device)
        self.alphabet = _alphabet()
        with torch.device("meta"):
            self.model = FairESM2(spec.layers, spec.hidden, spec.heads, alphabet=self.alphabet).eval()
        self.model.to_empty(device=self.device).to(dtype)
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        full = dict(state)
        for i in range(spec.layers):
            full[f"layers.{i}.self_attn.rot_emb.inv_freq"] = inv_freq
        missing, unexpected = self.model.load_state_dict(full, strict=False)
        left_over = [name for name in missing if not name.startswith(("lm_head.", "contact_head."))]
        if unexpected or left_over:
            raise RuntimeError(f"tensors that fair-esm's class does not take: {unexpected}, or lacks: {left_over}")
        if dtype != torch.float32:
            tables = torch.float64 if dtype == torch.float64 else torch.float32
            for layer in self.model.layers:
                layer.self_attn.rot_emb = _WideRotary(inv_freq.to(self.device, tables))

    def embed(self, sequence: str | list[int], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden rows of one sequence, with `<cls>` and `<eos>`: layer -> [length + 2, D] on the device."""
        ids = encode(sequence) if isinstance(sequence, str) else sequence
        return {layer: rows[0] for layer, rows in self._run(torch.tensor([ids]), layers).items()}

    def embed_padded(self, encoded: list[list[int]], layers: Sequence[int]) -> list[dict[int, torch.Tensor]]:
        """The same for several sequences as one ordinary padded batch."""
        tokens = torch.full((len(encoded), max(map(len, encoded))), self.alphabet.padding_idx)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        found = self._run(tokens, layers)
        return [{layer: found[layer][i, : len(ids)] for layer in layers} for i, ids in enumerate(encoded)]

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        return self.model(tokens.to(self.device), repr_layers=list(layers))["representations"]


@cache
def _alphabet() -> Alphabet:
    return Alphabet.from_architecture("ESM-1b")


def encode(text: str, longest: int | None = None) -> list[int]:
    """Token ids of a cleaned sequence (`clean`), cut after `longest` residues, with `<cls>` and `<eos>`."""
    return [_alphabet().cls_idx, *_alphabet().encode(text)[:longest], _alphabet().eos_idx]


class _WideRotary(RotaryEmbedding):
    """fair-esm's rotary embedding, computed in the dtype of `inv_freq` whatever the model's."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__(2 * len(inv_freq))
        self.inv_freq = inv_freq

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = super().forward(q.to(self.inv_freq.dtype), k.to(self.inv_freq.dtype))
        return wide[0].to(q.dtype), wide[1].to(k.dtype)


def records(path: str, sha: "hashlib._Hash | None" = None) -> Iterator[tuple[bytes, bytes]]:
    """(header without `>`, raw text of the lines joined) of every record, plain or compressed; feeds `sha` every byte."""
    header: bytes | None = None
    lines: list[bytes] = []
    with open(path, "rb") as raw, _plain(raw) as file:
        for line in file:
            if sha is not None:
                sha.update(line)
            if line.startswith(b">") or (header is None and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b">"):
                if header is not None:
                    yield header, b"".join(lines)
                header = line.partition(b">")[2].strip()
                lines = []
            else:
                lines.append(line)
    if header is not None:
        yield header, b"".join(lines)


def _plain(file: IO[bytes]) -> Any:
    """The file's text; its first bytes say whether it is compressed, not its name."""
    magic = file.read(6)
    file.seek(0)
    packed = magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
    return xopen(file, "rb", threads=0) if packed else file


def name_of(header: bytes, full: bool = False) -> str:
    """A record's name: its header up to the first white space, or all of it."""
    word = header if full else b"".join(header.split(None, 1)[:1])
    return word.decode("utf-8", "backslashreplace")


def clean(text: bytes) -> tuple[str, int, int]:
    """What of a record's text is embedded, the number of its residues, and how many of those were replaced by X.

    White space and one trailing `*` are dropped, lower case is raised, `<mask>` is one token, and what is outside
    the alphabet becomes X.
    """
    upper = text.translate(None, b"\n\r \t\v\f").removesuffix(b"*").upper()
    pieces = upper.decode("latin-1").split("<MASK>")
    replaced = sum(letter not in RESIDUES for piece in pieces for letter in piece)
    if replaced:
        pieces = ["".join(letter if letter in RESIDUES else "X" for letter in piece) for piece in pieces]
    return "<mask>".join(pieces), sum(map(len, pieces)) + len(pieces) - 1, replaced
