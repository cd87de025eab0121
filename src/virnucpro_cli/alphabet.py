"""The 33 tokens of the ESM-1b/ESM-2 alphabet and the byte tables that turn FASTA text into them.

Everything here is a 256-entry table for `bytes.translate`; white space is dropped by the caller through its
own code. Ids are those of fair-esm's `Alphabet.from_architecture("ESM-1b")`.
"""

from typing import Final

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

TOKEN_IDS: Final = bytes(code if code < len(TOKENS) else X for code in CODES)
"""Byte -> token id, everything outside the alphabet as X. White space must be deleted, not translated."""

NUCLEOTIDE_CODES: Final = frozenset(CODES[byte] for byte in b"ACGTUN")


def token_ids(text: bytes, length: int) -> bytes:
    """The first `length` token ids of raw sequence text: white space dropped, `<mask>` one token, no cls or eos.

    A trailing `*` falls off because `length` does not count it.
    """
    if b"<" in text:
        return _token_ids_with_masks(text)[:length]
    return text.translate(TOKEN_IDS, WHITE_SPACE)[:length]


def _token_ids_with_masks(text: bytes) -> bytes:
    pieces = text.translate(None, WHITE_SPACE).lower().split(MASK_TEXT)
    return bytes([MASK]).join(piece.translate(TOKEN_IDS) for piece in pieces)
