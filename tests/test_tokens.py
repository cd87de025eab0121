"""Tokens of several letters: those of transformers' fast tokenizer, whatever the file asks for, and whatever stands in a sequence."""

import fcntl
import mmap
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import tokenised as tokens
from virnucpro_cli.store import disk

READING = Reading(
    "ACGTN", 5, 1, 3, 2, 4, "N", (("U", "T"), ("-", "N"), (".", "N")), 4, scales_masks=False, width=4096
)  # fmt: skip
SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def trained(path: Path, size: int = 512) -> Path:
    """A tokenizer's file as DNABERT-S has it: byte pairs of A, C, G and T, with the cutting and the padding that it asks for."""
    generator = random.Random(0)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=list("ACGT"), show_progress=False
    )
    tokenizer.train_from_iterator(
        ("".join(generator.choices("ACGT", [3, 2, 2, 3], k=400)) for _ in range(200)), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(2000)
    tokenizer.enable_padding(length=2000, pad_id=3, pad_token="[PAD]")
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def table_of(sequences: list[str], folder: Path, dedup: bool = True, gaps: str = "keep") -> fasta.RecordTable:
    path = folder / "s.fna"
    path.write_text("".join(f">s{i} x\n{each[:70]}\n{each[70:]}\n" for i, each in enumerate(sequences)))
    return fasta.index(fasta.open_sources([str(path)], folder), reading=READING, dedup=dedup, gaps=gaps)


def ids_of(table: tokens.TokenTable, record: int) -> list[int]:
    found: list[int] = table.tokens(np.array([record])).tolist()
    return found


def odd(generator: random.Random) -> str:
    """Bases in either case, with N, IUPAC letters, gaps and U now and then; some are empty."""
    letters = generator.choice(["ACGT", "ACGT", "ACGTN", "acgtn", "ACGTRYKMSWBDHVN", "ACGU", "ACGTacgt-.", "N"])
    return "".join(generator.choices(letters, k=generator.choice([0, 1, 2, 7, 30, 100, 260, 501])))


@pytest.mark.parametrize("count", [2_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_tokens_are_those_of_transformers(tmp_path: Path, tokenizer: Path, count: int) -> None:
    generator = random.Random(1)
    sequences = [odd(generator) for _ in range(count)]
    table = tokens.tokenised(table_of(sequences, tmp_path), tokenizer, tmp_path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    read = [each.upper().replace("U", "T") for each in sequences]  # as VirNucPro does, and U as T
    read = [
        each[:-1] if each.endswith(".") and each[-2:-1] not in ("-", ".") else each for each in read
    ]  # a stop, by gffread
    for i, expected in enumerate(theirs(read)["input_ids"]):
        assert [1, *ids_of(table, i), 2] == expected, sequences[i]
    assert table.sizes.tolist() == [len(ids_of(table, i)) for i in range(count)]
    assert (table.length == [len(each) for each in read]).all()


def test_equal_sequences_share_their_tokens(tmp_path: Path, tokenizer: Path) -> None:
    table = tokens.tokenised(table_of(["ACGTAC", "GGGTT", "acguac"], tmp_path), tokenizer, tmp_path)
    assert table.first[0] == table.first[2] and ids_of(table, 0) == ids_of(table, 2) != ids_of(table, 1)


def test_records_are_encoded_some_at_a_time(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(2)
    sequences = [odd(generator) for _ in range(200)]
    whole = tokens.tokenised(table_of(sequences, tmp_path), tokenizer, tmp_path)
    monkeypatch.setattr(tokens, "AT_ONCE", 300)
    parts = tokens.tokenised(table_of(sequences, tmp_path), tokenizer, tmp_path)
    assert all_of(parts) == all_of(whole)


# --- kept ------------------------------------------------------------------------------------------------------------


def all_of(table: tokens.TokenTable) -> tuple[list[int], list[int]]:
    return table.sizes.tolist(), table.tokens(np.arange(len(table))).tolist()


class Encodings:
    """Texts that were encoded, of a tokenizer that is otherwise as it was."""

    def __init__(self, encode: Tokenizer):
        self.encode, self.texts = encode, 0
        self.to_str = encode.to_str

    def encode_batch(self, texts: list[str], **more: Any) -> Any:
        self.texts += len(texts)
        return self.encode.encode_batch(texts, **more)


@pytest.fixture
def kept(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Tokens of 200 sequences in blocks, kept in a file; how many were encoded for it, and what they are."""
    generator = random.Random(3)
    sequences = ["".join(generator.choices("ACGT", k=100 + i)) for i in range(200)]
    monkeypatch.setattr(tokens, "AT_ONCE", 2000)
    encode = tokens.encoder(tokenizer)

    def call(*more: str, is_over: Callable[[], bool] = lambda: False) -> tuple[int, Any]:
        counted = Encodings(encode)
        monkeypatch.setattr(tokens, "encoder", lambda path: counted)
        table = table_of([*sequences, *more], tmp_path)
        found = tokens.tokenised(table, tokenizer, tmp_path, tmp_path / "o.h5.tokens", is_over)
        return counted.texts, all_of(found)

    return call


def test_tokens_of_a_run_that_was_stopped_are_those_of_the_next(kept: Any, tmp_path: Path) -> None:
    checks = iter([False] * 5 + [True])
    with pytest.raises(InterruptedError):
        kept(is_over=lambda: next(checks))
    before = (tmp_path / "o.h5.tokens").stat().st_size
    count, found = kept()
    assert 0 < 200 - count < 200 and before < (tmp_path / "o.h5.tokens").stat().st_size
    assert kept() == (0, found)
    (tmp_path / "o.h5.tokens").unlink()
    assert kept() == (200, found)


@pytest.mark.parametrize("at", [0, 30, 70, 500, 5_000, -1])
def test_blocks_that_are_not_as_they_were_written_are_made_again(kept: Any, tmp_path: Path, at: int) -> None:
    path = tmp_path / "o.h5.tokens"
    _, found = kept()
    whole = path.read_bytes()
    path.write_bytes(whole[:at])
    assert kept()[1] == found and path.read_bytes() == whole
    if at != 0:  # such a file is not one of ours
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at:][1:])
        assert kept()[1] == found and path.read_bytes() == whole


def test_tokens_of_other_sequences_are_replaced_and_never_written_over(kept: Any, tmp_path: Path) -> None:
    _, found = kept()
    with open(tmp_path / "o.h5.tokens", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        as_it_was = mapped[:]
        count, longer = kept("ACGT" * 40, "ACGTT" * 80)
        assert 2 <= count < 200 and longer[0][:200] == found[0]
        assert mapped[:] == as_it_was
    assert kept()[1] == found


@pytest.mark.parametrize("content", [b"mine", b"virnucpro token"])
def test_a_file_that_is_not_of_tokens_is_left_alone(kept: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "o.h5.tokens"
    path.write_bytes(content)
    assert kept()[0] == kept()[0] == 200
    assert path.read_bytes() == content


def test_a_link_is_left_alone(kept: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / "o.h5.tokens").symlink_to(tmp_path / "mine")
    assert kept()[0] == 200 and (tmp_path / "mine").read_bytes() == b""


def test_tokens_that_another_run_writes_now_are_not_touched(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LINGER", 0.0)
    with open(tmp_path / "o.h5.tokens", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is writing"):
            kept()
    assert kept()[0] == 200


def test_a_mask_and_gaps_are_unknown_tokens(tmp_path: Path, tokenizer: Path) -> None:
    table = tokens.tokenised(
        table_of(["ACGT<mask>ACGT", "ACGTNACGT", "AC-GT", "AC--GT"], tmp_path), tokenizer, tmp_path
    )
    assert ids_of(table, 0) == ids_of(table, 1)
    assert ids_of(table, 2).count(0) == 1 and ids_of(table, 3).count(0) == 2
    stripped = tokens.tokenised(table_of(["AC--GT", "ACGT"], tmp_path, gaps="strip"), tokenizer, tmp_path)
    assert ids_of(stripped, 0) == ids_of(stripped, 1)


def test_the_stand_in_has_tokens_as_long_as_the_published_ones(tmp_path: Path) -> None:
    """A slice of 500 bases has 86 to 116 tokens by the published tokenizer."""
    generator = random.Random(4)
    sequences = ["".join(generator.choices("ACGT", k=498)) for _ in range(50)]
    table = tokens.tokenised(table_of([*sequences, "AANAA"], tmp_path), None, tmp_path)
    assert 86 <= table.sizes[:50].mean() <= 116
    encoder = tokens.encoder(None)
    assert [encoder.id_to_token(each) for each in ids_of(table, 50)] == ["AA", "[UNK]", "AA"]
    assert encoder.get_vocab_size() <= 4096 and tokens.encoder(None).to_str() == encoder.to_str()


def test_another_file_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "broken.json").write_text(tokenizer.read_text()[:-9])
    with pytest.raises(UserError, match="is no tokenizer"):
        tokens.encoder(tmp_path / "broken.json")
    with pytest.raises(UserError, match="is no tokenizer"):
        tokens.encoder(tmp_path / "nothing.json")
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="no tokenizer of nucleotides"):
        tokens.encoder(tmp_path / "other.json")
