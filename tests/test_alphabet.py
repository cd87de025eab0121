"""Text to token ids, with fair-esm's own alphabet as the definition."""

import pytest
from esm.data import Alphabet
from hypothesis import given
from hypothesis import strategies as st

from virnucpro_cli import alphabet
from virnucpro_cli.alphabet import token_ids

ESM = Alphabet.from_architecture("ESM-1b")
LETTERS = [token for token in ESM.all_toks if len(token) == 1]
WHITE_SPACE = b" \t\r\n\v\f"
UNKNOWN = sorted(set(range(256)) - set("".join(LETTERS + [t.lower() for t in LETTERS]).encode()) - set(WHITE_SPACE))

texts = st.lists(st.sampled_from([*LETTERS, "<mask>"]), min_size=1, max_size=60)


def test_every_token_has_the_id_that_fair_esm_gives_it() -> None:
    assert {token: i for i, token in enumerate(alphabet.TOKENS)} == ESM.tok_to_idx
    special = [alphabet.CLS, alphabet.PAD, alphabet.EOS, alphabet.MASK]
    assert special == [ESM.cls_idx, ESM.padding_idx, ESM.eos_idx, ESM.mask_idx]
    assert ESM.get_tok(alphabet.X) == "X"


@given(texts)
def test_text_becomes_the_tokens_that_fair_esm_makes_of_it(tokens: list[str]) -> None:
    assert list(token_ids("".join(tokens).encode(), len(tokens))) == ESM.encode("".join(tokens))


def test_mask_is_one_token_and_its_neighbours_are_kept() -> None:
    assert list(token_ids(b"M<mask>K<mask><mask>", 5)) == [
        ESM.get_idx(t) for t in ("M", "<mask>", "K", "<mask>", "<mask>")
    ]


@pytest.mark.parametrize("text", [b"<MASK>", b"<Mask>", b"<ma\nsk>", b" <mask\r\n>"])
def test_mask_is_found_in_any_case_and_across_lines(text: bytes) -> None:
    assert list(token_ids(text, 1)) == [ESM.mask_idx]


@pytest.mark.parametrize("text", [b"<cls>", b"<pad>", b"<eos>", b"<unk>", b"<null_1>"])
def test_no_other_special_token_can_be_written_in_a_sequence(text: bytes) -> None:
    ids = token_ids(text, len(text))
    assert len(ids) == len(text)
    assert all(len(ESM.get_tok(i)) == 1 for i in ids)


@given(st.lists(st.sampled_from(UNKNOWN), min_size=1, max_size=40))
def test_a_run_of_unknown_characters_is_as_many_x_never_fewer(unknown: list[int]) -> None:
    m, x, k = (ESM.get_idx(t) for t in "MXK")
    assert list(token_ids(b"M" + bytes(unknown) + b"K", len(unknown) + 2)) == [m, *[x] * len(unknown), k]


@given(texts)
def test_lower_case_equals_upper_case(tokens: list[str]) -> None:
    text = "".join(tokens)
    assert token_ids(text.lower().encode(), len(tokens)) == token_ids(text.upper().encode(), len(tokens))


@given(texts, st.data())
def test_white_space_is_never_a_token(tokens: list[str], data: st.DataObject) -> None:
    text = "".join(tokens)
    gaps = data.draw(st.lists(st.text(WHITE_SPACE.decode(), max_size=2), min_size=len(text), max_size=len(text)))
    spaced = "".join(gap + character for gap, character in zip(gaps, text, strict=True))
    assert token_ids(spaced.encode(), len(tokens)) == token_ids(text.encode(), len(tokens))


def test_nothing_past_the_length_is_returned() -> None:
    assert len(token_ids(b"MKLV*\n", 4)) == 4
    assert len(token_ids(b"MK<mask>V*\n", 4)) == 4
    assert token_ids(b"*\n", 0) == b""
