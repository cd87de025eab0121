"""The tokens of a model family and the byte tables that turn FASTA text into them; by default fair-esm's 33.

Everything here is a 256-entry table for `bytes.translate`; white space is dropped by the caller through its
own code. Ids of the default are those of fair-esm's `Alphabet.from_architecture("ESM-1b")`.
"""

from functools import cache
from string import ascii_uppercase
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
MASK: Final = 32

# Codes above every token id, seen only between the reader's first look at a byte and its policies.
DASH: Final = 198
DOT: Final = 199
INVALID: Final = 200
STAR: Final = 201
LESS: Final = 202
GREATER: Final = 203
INVALID_LETTERS: Final = 204
"""The code of an A that is no token, then those of B to Z; so that `<mask>` is known by its codes."""
SPACE: Final = 255

WHITE_SPACE: Final = b"\n\r \t\v\f"
MASK_TEXT: Final = b"<mask>"
GAPS: Final = b"-."


RESIDUES: Final = "".join(token for token in TOKENS if len(token) == 1)


class Reading(NamedTuple):
    """How a model family reads sequences of a kind: letters, and ids of tokens, by default those of fair-esm.

    letters: tokens of one letter, whose ids follow each other from `first`. unknown: the letter for all others.
    also: letters that are read as another one, in pairs. standard: number of letters, from the first on, that are
    amino acids (or bases). scales_masks: whether rows beside a `<mask>` are scaled by the share of the tokens that are
    not masked. zero: the id that column 0 of logits belongs to. width: columns of logits.
    """

    letters: str = RESIDUES
    first: int = TOKENS.index("L")
    cls: int = CLS
    pad: int = PAD
    eos: int = EOS
    mask: int = MASK
    unknown: str = "X"
    also: tuple[tuple[str, str], ...] = ()
    standard: int = 20
    scales_masks: bool = True
    zero: int = 0
    width: int = len(TOKENS)

    def ids(self) -> dict[str, int]:
        """Token id of each letter that it has, in upper case."""
        ids = {letter: self.first + i for i, letter in enumerate(self.letters)}
        return ids | {letter: ids[other] for letter, other in self.also}


ESM: Final = Reading()
"""The reading of fair-esm."""


class Letters(NamedTuple):
    """How gaps are read, as tables of 256 bytes, and by which family.

    codes: byte -> token id, lower case accepted, or one of the codes above; settled: code -> token id, by the policy
    for gaps. ids: byte -> token id; text: the same, and SPACE and LESS as codes. dropped: bytes that are no part of a
    sequence. outside: bytes that are no residues.
    """

    codes: bytes
    settled: bytes
    ids: bytes
    text: bytes
    dropped: bytes
    outside: bytes
    reading: Reading


@cache
def letters(gaps: str = "keep", reading: Reading = ESM) -> Letters:
    """Tables of a policy for gaps: `strip` drops them, `x` reads them as X; others have them as tokens (fair-esm)."""
    tokens = reading.ids()
    codes, settled = bytearray([INVALID]) * 256, bytearray([tokens[reading.unknown]]) * 256
    for i, letter in enumerate(ascii_uppercase):
        codes[ord(letter)] = codes[ord(letter.lower())] = tokens.get(letter, INVALID_LETTERS + i)
    for letter, token in tokens.items():
        codes[ord(letter)] = codes[ord(letter.lower())] = settled[token] = token
    for letter, code in (("-", DASH), (".", DOT), ("*", STAR), ("<", LESS), (">", GREATER)):
        codes[ord(letter)] = code
        if letter in tokens and (gaps != "x" or code not in (DASH, DOT)):
            settled[code] = tokens[letter]
    for byte in WHITE_SPACE:
        codes[byte] = SPACE
    ids = codes.translate(settled)
    apart = WHITE_SPACE + GAPS if gaps == "strip" else WHITE_SPACE
    text = bytes(SPACE if byte in apart else LESS if byte == ord("<") else token for byte, token in enumerate(ids))
    outside = (byte for byte, code in enumerate(codes) if INVALID <= code < SPACE and chr(byte) not in tokens)
    return Letters(bytes(codes), bytes(settled), bytes(ids), text, apart, bytes(outside), reading)


KEEP: Final = letters("keep")


def token_ids(text: bytes, length: int, letters: Letters = KEEP) -> bytes:
    """The first `length` token ids of raw sequence text: white space dropped, `<mask>` one token, no cls or eos.

    A trailing `*` or `.` falls off because `length` does not count it.
    """
    if b"<" in text:
        pieces = text.translate(None, letters.dropped).lower().split(MASK_TEXT)
        return bytes([letters.reading.mask]).join(piece.translate(letters.ids) for piece in pieces)[:length]
    return text.translate(letters.ids, letters.dropped)[:length]


def without_stop(text: bytes) -> bytes:
    """A sequence without the stop at its end: one `*`, or one `.` that is no gap among gaps (gffread)."""
    if text.endswith(b".") and text[-2:-1] not in (b"-", b"."):
        text = text[:-1]
    return text.removesuffix(b"*")
