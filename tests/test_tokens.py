"""Tokens of several letters: those of transformers' fast tokenizer, whatever the file asks for, and whatever stands in a sequence."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import tokenised as tokens

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


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
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
    for name in ("ids", "first", "count"):
        assert (getattr(whole, name) == getattr(parts, name)).all()


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
