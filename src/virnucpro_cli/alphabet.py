"""The 33 tokens of the ESM-1b/ESM-2 alphabet and the byte tables that turn FASTA text into them.

Everything here is a 256-entry table for `bytes.translate`; white space is dropped by the caller through its
own code. Ids are those of fair-esm's `Alphabet.from_architecture("ESM-1b")`.
"""

from functools import cache
from typing import Final, NamedTuple

TOKENS: Final = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    "L", "A", "G", "V", "S", "E", "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W", "C",
    "X", "B", "U", "Z", "O", ".", "-",
    "<null_1>", "<mask>",
)  # fmt: skip
CLS: Final = 0
PAD: Final = 1
EOS: Final = 2
X: Final = TOKENS.index("X")
CHAIN_BREAK: Final = 31
"""Fair-esm's `<null_1>`; ESM C reads `|` as it."""
MASK: Final = 32

# Codes above every token id, seen only between the reader's first look at a byte and its policies.
INVALID: Final = 200
STAR: Final = 201
LESS: Final = 202
GREATER: Final = 203
SPACE: Final = 255

WHITE_SPACE: Final = b"\n\r \t\v\f"
MASK_TEXT: Final = b"<mask>"


def _codes() -> bytes:
    table = bytearray([INVALID]) * 256
    for token_id, token in enumerate(TOKENS):
        if len(token) == 1:
            table[ord(token.upper())] = token_id
            table[ord(token.lower())] = token_id
    table[ord("*")] = STAR
    table[ord("<")] = LESS
    table[ord(">")] = GREATER
    for byte in WHITE_SPACE:
        table[byte] = SPACE
    return bytes(table)


CODES: Final = _codes()
"""Byte -> token id (lower case accepted), or one of the codes above."""

GAPS: Final = b"-."
DASH: Final = TOKENS.index("-")
DOT: Final = TOKENS.index(".")
BREAK: Final = ord("|")


class Reading(NamedTuple):
    """How a model family reads a sequence, where families differ.

    chain_break: whether `|` is a token. scales_masks: whether rows beside a `<mask>` are scaled by the share of the
    tokens that are not masked.
    """

    chain_break: bool = False
    scales_masks: bool = True

    @property
    def more_letters(self) -> str:
        """The letters that are residues beside those of fair-esm."""
        return chr(BREAK) if self.chain_break else ""


ESM: Final = Reading()
"""The reading of fair-esm."""


class Letters(NamedTuple):
    """How gaps are read, as tables of 256 bytes, and by which family.

    codes: as CODES, with the family's own letters; ids: token ids, all outside the alphabet as X, and gaps by their
    policy; text: token ids, and SPACE and LESS as codes. dropped: bytes that are no part of a sequence.
    outside: bytes that are no residues.
    """

    codes: bytes
    ids: bytes
    text: bytes
    dropped: bytes
    outside: bytes
    reading: Reading


@cache
def letters(gaps: str = "keep", reading: Reading = ESM) -> Letters:
    """Tables of a policy for gaps: `strip` drops them, `x` reads them as X; others have them as tokens (fair-esm)."""
    as_gap = {"strip": SPACE, "x": X}
    own = {BREAK: CHAIN_BREAK} if reading.chain_break else {}
    codes = bytes(own.get(byte, code) for byte, code in enumerate(CODES))
    by_policy = bytes(as_gap.get(gaps, code) if byte in GAPS else code for byte, code in enumerate(codes))
    ids = bytes(code if code < len(TOKENS) else X for code in by_policy)
    text = bytes(code if code in (SPACE, LESS) else token for code, token in zip(by_policy, ids, strict=True))
    dropped = WHITE_SPACE + GAPS if gaps == "strip" else WHITE_SPACE
    outside = bytes(byte for byte, code in enumerate(codes) if INVALID <= code < SPACE)
    return Letters(codes, ids, text, dropped, outside, reading)


KEEP: Final = letters("keep")


def token_ids(text: bytes, length: int, letters: Letters = KEEP) -> bytes:
    """The first `length` token ids of raw sequence text: white space dropped, `<mask>` one token, no cls or eos.

    A trailing `*` or `.` falls off because `length` does not count it.
    """
    if b"<" in text:
        pieces = text.translate(None, letters.dropped).lower().split(MASK_TEXT)
        return bytes([MASK]).join(piece.translate(letters.ids) for piece in pieces)[:length]
    return text.translate(letters.ids, letters.dropped)[:length]


def without_stop(text: bytes) -> bytes:
    """A sequence without the stop at its end: one `*`, or one `.` that is no gap among gaps (gffread)."""
    if text.endswith(b".") and text[-2:-1] not in (b"-", b"."):
        text = text[:-1]
    return text.removesuffix(b"*")
