"""Sequences as tokens of several letters, by a tokenizer's file: byte pair encoding by the tokenizers library.

A tokenizer of nucleotides knows A, C, G and T. Each other letter is one unknown token, which no token reaches across.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.fasta.table import RecordTable
from virnucpro_cli.fasta.token_file import Block, TokenFile
from virnucpro_cli.store.schema import chunks
from virnucpro_cli.texts import ranges

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LETTERS, UNKNOWN = b"ACGT", b"N"
SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
STAND_IN = 4096
"""Tokens of the tokenizer of random weights, as many as the published one has."""
AT_ONCE = 1 << 22
"""Letters that are read, and encoded on all cores, at once. Tokens of no more are not worth keeping."""


@dataclass
class TokenTable(RecordTable):
    """The table of records whose tokens are known. Equal records share theirs.

    ids: uint16 [M], tokens of all; first: int64 [N], the place of each record's first; count: int32 [N].
    """

    ids: NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    first: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    count: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Tokens of each record, int32 [N], without the first and the last."""
        return self.count

    def unit(self, letter: str) -> str:
        return "token"

    def tokens(self, records: NDArray[np.int64]) -> NDArray[Any]:
        """Token ids of int64 [n] records, one record behind the other: uint16 [sum of their sizes]."""
        return self.ids[ranges(self.first[records], self.count[records].astype(np.int64))]


def tokenised(
    table: RecordTable, path: Path | None, folder: Path, kept: Path | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> TokenTable:  # fmt: skip
    """The table with the tokens of all its records, which lie in a file.

    path: the tokenizer's file; None for the stand-in of random weights. kept: where tokens lie that are worth keeping,
    and may lie from a run that was killed; None for a nameless file in the folder. is_over: whether nobody waits any
    more. Raises UserError if it is no such file, or there is no room, and InterruptedError if nobody waits.
    """
    from tokenizers import __version__

    encode = encoder(path)
    made_by = f"{__version__}\n{encode.to_str()}"
    is_first = table.unique_of == np.arange(len(table))
    chosen, count, first = np.flatnonzero(is_first), np.zeros(len(table), np.int32), np.zeros(len(table), np.int64)
    lengths = table.length[chosen].astype(np.int64)
    is_worth = int(lengths.sum()) > AT_ONCE
    try:
        with TokenFile(folder, kept if is_worth else None) as file:
            for begin, end in chunks(np.append(0, np.cumsum(lengths)), len(chosen), AT_ONCE):
                if is_over():
                    raise InterruptedError
                some = chosen[begin:end]
                block = _block(file, encode, made_by, list(_texts(table, some)))
                count[some] = block.counts
                first[some] = block.first + np.cumsum(block.counts, dtype=np.int64) - block.counts
            ids = file.mapped()
    except InterruptedError:
        raise
    except OSError as error:
        raise UserError(f"Tokens cannot be kept in {folder}: {error.strerror}.", "Make room there.") from None
    same = table.unique_of
    return TokenTable(**_facts(table), ids=ids, first=first[same], count=count[same])


def _block(file: TokenFile, encode: "Tokenizer", made_by: str, texts: list[str]) -> Block:
    """The tokens of texts, from the file if it has them next. made_by: all that the tokens of a text depend on."""
    key = xxhash.xxh3_128_digest("\n".join((made_by, *texts)).encode())
    if (there := file.found(key)) is not None:
        return there
    encoded = [each.ids for each in encode.encode_batch(texts, add_special_tokens=False)]
    ids = np.fromiter(chain.from_iterable(encoded), np.uint16)
    return file.add(key, np.fromiter(map(len, encoded), np.int32, len(encoded)), ids)


def as_counted(table: RecordTable, count: NDArray[np.int32]) -> TokenTable:
    """The table with the number of tokens of each record, int32 [N], as a file has it; the tokens are not known."""
    return TokenTable(**_facts(table), count=count)


def _facts(table: RecordTable) -> dict[str, Any]:
    return {each.name: getattr(table, each.name) for each in fields(RecordTable) if each.init}


def _texts(table: RecordTable, records: NDArray[np.int64]) -> Iterator[str]:
    """Sequences of records, int64 [n], in A, C, G, T, and N for all else."""
    text = RecordTable.tokens(table, records).tobytes().translate(_letters(table.reading)).decode("ascii")
    ends = np.cumsum(table.length[records], dtype=np.int64).tolist()
    return (text[start:stop] for start, stop in pairwise([0, *ends]))


def _letters(reading: Reading) -> bytes:
    """The letter of each token id of a reading of single letters, as a table of 256 bytes."""
    letters = bytearray(UNKNOWN * 256)
    for letter, token in reading.ids().items():
        if letter.encode() in (LETTERS[i : i + 1] for i in range(4)):
            letters[token] = ord(letter)
    return bytes(letters)


def encoder(path: Path | None) -> "Tokenizer":
    """The tokenizer of a file, without the padding and the cutting that the file may ask for; None gives the stand-in.

    Raises UserError if the file cannot be read, or is no tokenizer of nucleotides.
    """
    from tokenizers import Tokenizer

    if path is None:
        return _stand_in()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        remedy = "Copy the model's tokenizer.json again."
        raise UserError(f"{path} is no tokenizer: {in_a_line(error)}.", remedy) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    known = [tokenizer.token_to_id(token) for token in (*SPECIALS, *map(chr, LETTERS))]
    if known != list(range(len(known))) or tokenizer.get_vocab_size() > 1 << 16:
        raise UserError(f"{path} is no tokenizer of nucleotides: its first tokens are others.", "Name the model's own.")
    return tokenizer


def _stand_in() -> "Tokenizer":
    """A tokenizer for random weights: trained on made-up bases, it makes tokens as long as the published one does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    dice, tokenizer = random.Random(0), Tokenizer(models.BPE(unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list(map(chr, LETTERS))
    trainer = trainers.BpeTrainer(
        vocab_size=STAND_IN, special_tokens=[*SPECIALS], initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    made_up = ("".join(dice.choices(letters, (3, 2, 2, 3), k=500)) for _ in range(400))
    tokenizer.train_from_iterator(made_up, trainer)
    return tokenizer
