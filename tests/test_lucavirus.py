"""LucaVirus against its authors' own class, on proteins and nucleotides: rows, logits, letters, checkpoints, mistakes."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from conftest import loaded, randomise, relative_l2, write_model
from packs import among_strangers, embeddings, one_pack, random_protein
from sabotage import without_packing
from test_model import CPU, assert_within_gates, embed, expected, packed_model, same_bits, worst
from virnucpro_cli import alphabet, fasta
from virnucpro_cli.benchmark.bench import bench_model
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange.export import export_file
from virnucpro_cli.exchange.extract import extract_files
from virnucpro_cli.explore import inspect
from virnucpro_cli.kinds import NUCLEOTIDE, PROTEIN
from virnucpro_cli.machine import fetch
from virnucpro_cli.model import attention, esm2, families, locate, lucavirus, plain, weights
from virnucpro_cli.model.lucavirus import LUCAVIRUS
from virnucpro_cli.model.packed import Parts
from virnucpro_cli.model.scores import TokenHead
from virnucpro_cli.model.spec import INV_FREQ, ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import oracle_of, plain_reader, verify
from virnucpro_cli.validation.validate import validate_model

State = dict[str, torch.Tensor]
SMALL = ModelSpec("small", 4, 64, 2, "lucavirus")
KINDS = (PROTEIN, NUCLEOTIDE)
BOTH = pytest.mark.parametrize("kind", KINDS)
ODD = {
    PROTEIN: ["MKUBZOXVJ", "M.K-V*L", "MK<mask>VLA", "<mask>" * 4, "M", "U", "MKTVRQERLKSIVR<mask><mask>EPUKJ"],
    NUCLEOTIDE: ["ATUCGN", "A-C.G", "AC<mask>GTU", "<mask>" * 4, "T", "N", "GATTACANNNNGATTACA<mask><mask>UC"],
}
"""Letters that are rare, gaps, stops, masked letters, and one letter."""


def reference_of(kind: str) -> Any:
    """The oracle, whose package takes seconds to import."""
    return oracle_of(SMALL, kind)


def sequences_of(kind: str, *lengths: int) -> list[str]:
    generator = random.Random(1)
    if kind == PROTEIN:
        return [random_protein(length, generator) for length in lengths]
    return ["".join(generator.choices("ACGT", k=length)) for length in lengths]


def written(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


def authors_model(seed: int = 0, spec: ModelSpec = SMALL) -> Any:
    """The authors' masked language model with random weights; the last matrix is the token embedding."""
    from lucavirus import LucaVirusConfig, LucaVirusForMaskedLM

    torch.manual_seed(seed)
    config = LucaVirusConfig(
        hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LucaVirusForMaskedLM(config).eval()
    randomise(model)
    with torch.no_grad():
        model.lm_head.decoder.weight.copy_(model.lucavirus.embeddings.embed_tokens.weight)
    return model


def original(state: State) -> State:
    """The names of the authors' training code, with heads of tasks."""
    names = {
        name: name.removeprefix("lucavirus.").removeprefix("embeddings.").removeprefix("encoder.") for name in state
    }
    found = {names[name].replace("lm_head.decoder.weight", "lm_head.weight"): each for name, each in state.items()}
    for head in ("hidden_layer_list.0.0", "classifier_list.0.1", "contact_head.regression", "output_list.0"):
        found |= {f"{head}.weight": torch.ones(3, 3), f"{head}.bias": torch.ones(3)}
    return found | {"loss_fct_list.0.pos_weight": torch.ones(3)}


def checkpoint(folder: Path, layout: str, model: Any) -> Path:
    """A checkpoint of the model in a layout."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    if layout in ("hub", "encoder", "tied"):
        config = json.loads(model.config.to_json_string()) | {"tie_word_embeddings": layout != "hub"}
        (folder / "config.json").write_text(json.dumps(config))
        if layout == "encoder":
            state = {name.removeprefix("lucavirus."): each for name, each in state.items() if "lm_head" not in name}
        if layout == "tied":
            del state["lm_head.decoder.weight"]
        save_file(state, folder / "model.safetensors")
        return folder
    state = original(state)
    if layout == "module":
        state = {f"module.{name}": each for name, each in state.items()}
    torch.save(state, folder / "pytorch.pth")
    return folder / "pytorch.pth"


LAYOUTS = ["hub", "tied", "encoder", "original", "module"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("lucavirus") / "small", "hub", authors_model())


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lucavirus_is_its_authors_own_model_for_both_kinds(tmp_path: Path) -> None:
    """Layers 0, first and last at the published width, with mixed lengths in one pack."""
    spec = ModelSpec("wide", 2, 2560, 20, "lucavirus")
    state = weights.random_state(spec, seed=2)
    model = packed_model(spec, state)
    for kind in KINDS:
        judge = reference_of(kind)(spec, state)
        sequences = [*sequences_of(kind, 3, 130), *ODD[kind]]
        wanted = [expected(judge, sequence, (0, 1, 2)) for sequence in sequences]
        assert_within_gates(embed(model, sequences, tmp_path, (0, 1, 2), kind=kind), wanted)
        del judge


@BOTH
def test_a_long_sequence_has_the_authors_rows(kind: str, tmp_path: Path) -> None:
    state = weights.random_state(SMALL, seed=2)
    sequences, judge = sequences_of(kind, 1022, 2500), reference_of(kind)(SMALL, state)
    wanted = [expected(judge, sequence, (1, 2, 4)) for sequence in sequences]
    assert_within_gates(embed(packed_model(SMALL, state), sequences, tmp_path, (1, 2, 4), kind=kind), wanted)


@BOTH
def test_a_sequence_of_lucavirus_has_the_same_bits_in_any_company(kind: str, tmp_path: Path) -> None:
    model = packed_model(SMALL, weights.random_state(SMALL))
    probes = [*sequences_of(kind, 5, 200, 61, 61), *ODD[kind]]
    alone = [embed(model, [probe], tmp_path, (0, 1, 4), rows=1024, kind=kind)[0] for probe in probes]
    for rows in (1024, 2048):
        sequences, at = among_strangers(probes, rows, random.Random(rows))
        found = embed(model, sequences, tmp_path, (0, 1, 4), rows=rows, kind=kind)
        assert all(same_bits(found[i], one) for i, one in zip(at, alone, strict=True))
    assert all(map(same_bits, embed(model.in_parts(100), probes, tmp_path, (0, 1, 4), rows=1024, kind=kind), alone))


@BOTH
def test_sixteen_bits_are_near_the_authors_rows(kind: str, tmp_path: Path) -> None:
    """fp16 within 3e-3, and bf16 within 2e-2."""
    state, sequences = weights.random_state(SMALL, seed=2), sequences_of(kind, 60, 300)
    judge = reference_of(kind)(SMALL, state)
    wanted = [expected(judge, sequence, (4,)) for sequence in sequences]
    for dtype, limit in ((torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        model = families.build(SMALL, state, dtype, CPU, attention.resolve("sdpa", CPU, dtype))
        assert worst(embed(model, sequences, tmp_path, (4,), kind=kind), wanted)["residue"] < limit


def test_a_kind_has_rows_of_its_own_from_the_first_layer_on(tmp_path: Path) -> None:
    """The same letters, read as the two kinds, with `[CLS]` and `[SEP]` that differ by the rows of their kinds."""
    state = weights.random_state(SMALL)
    protein, nucleotide = (one_pack(tmp_path, ["ACGT"], 64, families.reading(SMALL, kind)) for kind in KINDS)
    table = LUCAVIRUS.parts(SMALL, state, CPU).embedding
    types = state[lucavirus.TYPES]
    for row in (0, 5):
        mine, other = table[nucleotide.tokens[row]], table[protein.tokens[row]]
        assert relative_l2(other - mine, types[1] - types[0]) < 1e-5
    assert nucleotide.tokens[1:5].tolist() == [5, 7, 8, 6] and protein.tokens[1:5].tolist() == [50, 68, 51, 56]
    assert nucleotide.mask_ratio is None and protein.mask_ratio is None


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_authors_rows_and_logits(layout: str, tmp_path: Path) -> None:
    model = authors_model()
    spec, state, notes = loaded(checkpoint(tmp_path / "there", layout, model))
    assert (spec.family, spec.layers, spec.hidden, spec.heads) == ("lucavirus", 4, 64, 2)
    assert notes == ()
    for kind in KINDS:
        reference = reference_of(kind)
        (sequence,) = ODD[kind][-1:]
        tokens = torch.tensor([reference.encode(sequence)])
        types = torch.full_like(tokens, kind == PROTEIN)
        with torch.inference_mode():
            found = model(input_ids=tokens, token_type_ids=types, output_hidden_states=True)
        (ours,) = embed(packed_model(spec, state), [sequence], tmp_path, (0, 1, 2, 4), kind=kind)
        for layer in (0, 1, 2, 4):
            assert relative_l2(ours["residue", layer], found.hidden_states[layer][0, 1:-1]) < 2e-5
        if layout == "encoder":
            assert not any(name.startswith("lm_head") for name in state)
        else:
            logits = TokenHead(state, CPU, families.reading(spec, kind).width)(ours["residue", 4])
            assert logits.shape[1] == 39 and relative_l2(logits, found.logits[0, 1:-1]) < 2e-5


def test_every_layout_gives_the_same_bits(tmp_path: Path) -> None:
    model = authors_model()
    first, *others = (
        loaded(checkpoint(tmp_path / layout, layout, model))[1] for layout in LAYOUTS if layout != "encoder"
    )
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_frequencies_are_the_files_and_exact_without_any(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hub", "hub", authors_model())
    tensors = load_file(folder / "model.safetensors")
    exact = 1 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)
    _, state, notes = loaded(folder)
    assert torch.equal(state[INV_FREQ], exact) and notes == ()
    halved = {name: each * 0.5 if name.endswith("inv_freq") else each for name, each in tensors.items()}
    save_file(halved, folder / "model.safetensors")
    _, state, notes = loaded(folder)
    assert torch.equal(state[INV_FREQ], exact * 0.5) and "is not the exact one" in notes[0]
    save_file(
        {name: each for name, each in tensors.items() if not name.endswith("inv_freq")}, folder / "model.safetensors"
    )
    _, state, notes = loaded(folder)
    assert torch.equal(state[INV_FREQ], exact) and "has no inv_freq" in notes[0]


@pytest.mark.parametrize(
    "short", ["lucavirus", "LucaVirus-gene", "lucavirus-prot", "lucavirus-mask", "lucavirus-mask-1.4m"]
)
def test_the_names_of_lucavirus_lead_to_its_size_and_repositories(short: str) -> None:
    spec = families.by_name(short)
    assert spec is not None and (spec.layers, spec.hidden, spec.heads, spec.family) == (12, 2560, 20, "lucavirus")
    assert LUCAVIRUS.repository(spec) == f"LucaGroup/{spec.name}" and LUCAVIRUS.url(spec) is None
    assert families.by_name(f"LucaGroup/{spec.name}") == spec


def test_parameters_and_operations_are_of_this_network() -> None:
    spec = families.by_name("lucavirus")
    assert spec is not None and families.parameters(spec) == pytest.approx(0.94e9, rel=1e-2)
    assert families.flops(spec, 1, 0, 12) == pytest.approx(1.89e9, rel=1e-2)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(path)
    return f"{error.value.what} {error.value.remedy or ''}"


@pytest.mark.parametrize(
    ("word", "value"),
    [("vocab_size", 8), ("no_position_embeddings", False), ("no_token_type_embeddings", True), ("embed_scale", 2.0),
     ("use_embed_layer_norm", True), ("use_last_layer_norm", False), ("mask_token_id", 32)],
)  # fmt: skip
def test_a_configuration_of_another_network_is_refused(word: str, value: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hub", "hub", authors_model())
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-12
    (folder / "config.json").write_text(json.dumps(config | {word: value}))
    assert f"is not LucaVirus: {word}" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda tensors: tensors.pop("lucavirus.embeddings.embed_type.weight"), "lacks 1 tensors"),
     (lambda tensors: tensors.update({"lucavirus.embeddings.embed_pos.weight": torch.ones(9, SMALL.hidden)}), "does not have"),
     (lambda tensors: tensors.update({"lucavirus.embeddings.embed_layer_norm.weight": torch.ones(SMALL.hidden)}), "does not have")],
    ids=["no types", "positions", "a first norm"],
)  # fmt: skip
def test_tensors_that_are_not_lucavirus_are_refused(
    change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "hub", "hub", authors_model())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert message in refused(folder)


# --- letters ---------------------------------------------------------------------------------------------------------


@BOTH
def test_every_byte_has_the_authors_token_or_a_difference_that_is_told(kind: str) -> None:
    """Lower case is raised, as elsewhere, and a letter outside the alphabet is X; the package reads both as [UNK]."""
    from lucavirus import LucaVirusTokenizer

    how, tokenizer = families.reading(SMALL, kind), LucaVirusTokenizer()
    table = alphabet.letters("keep", how)
    for byte in set(range(33, 127)) - set(b"<>"):
        theirs = tokenizer.encode(chr(byte).upper(), "prot" if kind == PROTEIN else "gene", add_special_tokens=False)
        unknown = tokenizer.unk_idx in theirs or (kind == PROTEIN and chr(byte) in "12345")
        assert [table.ids[byte] - how.zero] == ([30] if unknown else theirs)
    special = [how.cls, how.pad, how.eos, how.mask]
    ids = [tokenizer.cls_idx, tokenizer.padding_idx, tokenizer.eos_idx, tokenizer.mask_idx]
    assert [each - how.zero for each in special] == ids and how.width == tokenizer.vocab_size


def indexed(folder: Path, sequences: list[str], kind: str, **options: Any) -> fasta.RecordTable:
    sources = fasta.open_sources([str(written(folder / "in.fasta", sequences))], folder)
    return fasta.index(sources, reading=families.reading(SMALL, kind), **options)


def tokens_of(table: fasta.RecordTable) -> list[list[int]]:
    return [[int(i) - table.reading.zero for i in table.tokens(np.array([row]))] for row in range(len(table))]


def test_nucleotides_are_read_in_any_case_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    """N is a letter, codes of IUPAC are read as N and counted, and so are gaps, in their own column."""
    table = indexed(tmp_path, ["acgtun", "ACGTTN", "ARYC*", "A-C.G", "A<Mask>C", "AXC|", "ac\n gt"], NUCLEOTIDE)
    acgttn = [5, 7, 8, 6, 6, 9]
    assert tokens_of(table) == [acgttn, acgttn, [5, 9, 9, 7], [5, 9, 7, 9, 8], [5, 4, 7], [5, 9, 7, 9], acgttn[:4]]
    assert table.replaced.tolist() == [0, 0, 2, 0, 0, 2, 0] and table.gaps.tolist() == [0, 0, 0, 2, 0, 0, 0]
    assert table.unique_of.tolist() == [0, 0, 2, 3, 4, 5, 6]
    assert tokens_of(indexed(tmp_path, ["A-C.G"], NUCLEOTIDE, gaps="strip")) == [[5, 7, 8]]
    with pytest.raises(UserError, match="has a '>' inside"):  # R and A stand for no other letter of <mask>
        indexed(tmp_path, ["A<rask>"], NUCLEOTIDE)


def test_proteins_have_j_and_stops_as_letters_and_x_for_what_is_none(tmp_path: Path) -> None:
    table = indexed(tmp_path, ["mkj", "MK*L*", "M-K.L", "M1|K", "M<mask>K"], PROTEIN)
    assert tokens_of(table) == [[26, 21, 35], [26, 21, 38, 10], [26, 37, 21, 36, 10], [26, 30, 30, 21], [26, 4, 21]]
    assert table.replaced.tolist() == [0, 0, 0, 2, 0] and table.gaps.tolist() == [0, 0, 2, 0, 0]
    assert tokens_of(indexed(tmp_path, ["M-K.L"], PROTEIN, gaps="x")) == [[26, 30, 21, 30, 10]]


@pytest.mark.parametrize(
    ("kind", "sequence", "letter", "words"),
    [(NUCLEOTIDE, "AC<mask>RT", "R", "is not a base"), (PROTEIN, "MKJ*L|", "|", "is not a residue"),
     (NUCLEOTIDE, "ACN-", "-", "is not a base")],
)  # fmt: skip
def test_a_strict_run_refuses_the_first_letter_that_is_none(
    kind: str, sequence: str, letter: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        indexed(tmp_path, [sequence], kind, on_invalid="error")
    assert f"column {sequence.index(letter) + 1}: {letter!r}" in error.value.what
    assert kind == PROTEIN or "as N" in error.value.remedy


@BOTH
def test_the_plain_reader_agrees_with_the_index(kind: str, tmp_path: Path) -> None:
    sequences = [*ODD[kind], "acgu", "ACGT", "A1-R*", "MK.", "RYKM-..", "*"]
    table = indexed(tmp_path, sequences, kind)
    letters = plain_reader.letters_of(families.reading(SMALL, kind))
    assert letters == reference_of(kind).letters
    plain = plain_reader.read([str(tmp_path / "in.fasta")], letters=letters)
    assert plain.lengths.tolist() == table.length.tolist() and plain.replaced.tolist() == table.replaced.tolist()
    same = [[a == b for a in plain.sequences.tolist()] for b in plain.sequences.tolist()]
    assert same == [[a == b for a in table.unique_of.tolist()] for b in table.unique_of.tolist()]


# --- whole runs ------------------------------------------------------------------------------------------------------


@BOTH
def test_a_file_has_the_authors_rows_and_scores_and_is_verified_and_audited(
    kind: str, small: Path, tmp_path: Path
) -> None:
    model, reference = authors_model(), reference_of(kind)
    path = written(tmp_path / "in.fasta", [*ODD[kind], *sequences_of(kind, 80, 30)])
    embed_fasta(
        path, tmp_path / "out.h5", model=str(small), kind=kind, device="cpu", store_dtype="fp32", layers=(0, 2, 4),
        pool=("mean", "bos", "eos", "max", "std", "residue"), emit=("logits", "entropy", "pseudo-perplexity"),
    )  # fmt: skip
    columns = slice(10, 30) if kind == PROTEIN else slice(5, 9)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.attributes["family"] == "lucavirus" and file.attributes.get("kind") == (
            kind if kind == NUCLEOTIDE else None
        )
        assert file.replaced.sum() == 0 and file.dataset("unmasked", "logits").shape[1] == 39
        for row, (_, text) in enumerate(plain_reader.records(str(path))):
            ids = torch.tensor([reference.encode(plain_reader.clean(text, letters=reference.letters)[0])])
            with torch.inference_mode():
                found = model(
                    input_ids=ids, token_type_ids=torch.full_like(ids, kind == PROTEIN), output_hidden_states=True
                )
            for layer in (0, 2, 4):
                assert relative_l2(file.residues(row, layer), found.hidden_states[layer][0, 1:-1]) < 2e-5
            logits = found.logits[0, 1:-1].double()
            assert relative_l2(file.logits(row), logits) < 2e-5
            own = logits.log_softmax(-1).gather(1, ids[0, 1:-1, None])
            assert file.dataset("unmasked", "pseudo_perplexity")[row] == pytest.approx(
                float(torch.exp(-own.mean())), rel=1e-4
            )
            p = logits[:, columns].softmax(-1)
            entropy = float(-(p * p.log()).sum(-1).mean())
            assert file.dataset("unmasked", "entropy")[row] == pytest.approx(entropy, rel=1e-4)
    assert verify.verify_file(str(tmp_path / "out.h5"), (str(path),), None).passed
    verdict = validate_model(against=str(tmp_path / "out.h5"), reference_device="cpu")
    assert verdict.passed, verdict.failed_parts


def test_nucleotides_go_through_windows_workers_shards_cache_and_search(small: Path, tmp_path: Path) -> None:
    """The same rows by every way, and an audit of windows."""
    from virnucpro_cli.cluster.merge import merge_shards
    from virnucpro_cli.explore import SearchConfig
    from virnucpro_cli.explore.search import search_file

    path = written(tmp_path / "in.fasta", sequences_of(NUCLEOTIDE, 300, 40, 90, 41, 25, 333))
    same: dict[str, Any] = {
        "model": str(small),
        "kind": NUCLEOTIDE,
        "device": "cpu",
        "long": "window",
        "max_residues": 100,
        "overlap": 20,
    }
    embed_fasta(path, tmp_path / "one.h5", cache=str(tmp_path / "cache"), **same)
    again = embed_fasta(path, tmp_path / "cached.h5", cache=str(tmp_path / "cache"), **same)
    assert again.counts["from the cache"] == 6
    forked.embed(path, tmp_path / "workers.h5", **same)
    for shard in ("1/2", "2/2"):
        embed_fasta(path, tmp_path / "shards.h5", shard=shard, **same)
    merge_shards(str(tmp_path / "shards.h5"))
    rows = {}
    for name in ("one", "cached", "workers", "shards"):
        with read_embeddings(tmp_path / f"{name}.h5") as file:
            rows[name] = file[:]
            assert file.settings["kind"] == NUCLEOTIDE and file.attributes["kind"] == NUCLEOTIDE
    assert all(np.array_equal(each, rows["one"]) for each in rows.values())
    assert validate_model(against=str(tmp_path / "shards.h5"), reference_device="cpu").passed
    hits = tmp_path / "hits.tsv"
    assert (
        search_file(SearchConfig(file=str(tmp_path / "one.h5"), query=str(path), k=1, output=str(hits), raw=True)) == 0
    )
    lines = [line.split("\t") for line in hits.read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == [line[1] for line in lines] and len(lines) == 6


def test_users_read_of_sequences_and_bases(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "in.fasta", ["ACGTRYACG", "AC-GT", "A" * 40])
    options: dict[str, Any] = {"model": str(small), "kind": NUCLEOTIDE, "device": "cpu"}
    report = embed_fasta(path, tmp_path / "out.h5", max_residues=30, quiet=False, **options)
    notes = " ".join(report.notes)
    assert "1 of 3 sequences with 2 bases outside the alphabet, embedded as N" in notes
    assert "1 of 3 sequences with gaps, 1 letter - or ., embedded as N; --gaps strip leaves them out" in notes
    assert "1 of 3 sequences truncated" in notes and report.environment["kind"] == NUCLEOTIDE
    told = capsys.readouterr().err
    assert "3 of 3 sequences embedded" in told and "protein" not in told.replace(str(tmp_path), "")
    with read_embeddings(tmp_path / "out.h5") as file:
        words = inspect.methods(file)
    assert "LucaVirus" in words and "of 3 sequences (54 bases, read as nucleotides)" in words
    assert "mean over bases" in words and "In 1 sequence, bases outside the alphabet were embedded as N." in words
    assert "protein" not in words and "residue" not in words
    inspect.inspect_file(str(tmp_path / "out.h5"))
    assert "bases embedded" in capsys.readouterr().out


def test_a_share_of_a_cluster_says_how_its_kind_is_read(tmp_path: Path) -> None:
    from virnucpro_cli.cluster.ray import actor

    table = indexed(tmp_path, ["AC<mask>GU"], NUCLEOTIDE)
    share: Any = actor.Share(*[None] * (len(actor.Share._fields) - 1), table.reading)
    texts = actor.Texts(share._replace(sizes=table.length, tokens=table.tokens(np.array([0]))))
    assert texts.reading == LUCAVIRUS.NUCLEOTIDES and texts.tokens(np.array([0])).tolist() == [5, 7, 4, 8, 6]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [({"emit": ("contacts",)}, "has no contact regression"), ({"kind": NUCLEOTIDE, "force_protein": True}, "--force-protein"),
     ({"kind": NUCLEOTIDE, "from_": "contigs"}, "--from contigs"), ({"kind": "dna"}, "kind")],
)  # fmt: skip
def test_what_lucavirus_cannot_do_is_refused_in_one_sentence(
    options: dict[str, Any], words: str, small: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "in.fasta", ["MKVLAAGW"])
    with pytest.raises(UserError, match=words):
        embed_fasta(path, tmp_path / "out.h5", model=str(small), device="cpu", **options)


def test_nucleotides_are_refused_with_their_kind_as_the_remedy_where_there_is_one(
    small: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "in.fasta", sequences_of(NUCLEOTIDE, 60, 80))
    for model, named in ((small, True), (tiny_model, False)):
        with pytest.raises(UserError, match="looks like nucleotides") as error:
            embed_fasta(path, tmp_path / "out.h5", model=str(model), device="cpu")
        assert ("--kind nucleotide" in error.value.remedy) == named
    with pytest.raises(UserError, match="reads proteins only, not --kind nucleotide") as error:
        embed_fasta(path, tmp_path / "out.h5", model=str(tiny_model), device="cpu", kind=NUCLEOTIDE)
    assert "LucaVirus" in error.value.remedy
    with pytest.raises(UserError, match="reads proteins only"):
        validate_model(model=str(tiny_model), fasta=str(path), kind=NUCLEOTIDE, device="cpu")
    shipped = validate_model(
        model=str(small), kind=NUCLEOTIDE, device="cpu", sample=3, max_residues=100, token_budget=1024
    )
    assert shipped.passed and shipped.environment["inputs"] == "the sequences that ship with virnucpro"


def test_fair_esms_files_are_not_made_of_another_alphabet(small: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "in.fasta", ["MKVLAAGW"])
    with pytest.raises(UserError, match="has another alphabet than fair-esm"):
        extract_files(str(small), str(path), str(tmp_path / "out"), ("mean",), gpu=False)


def test_the_kind_is_part_of_a_run_and_proteins_have_none(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "in.fasta", ["ACGT"])
    embed_fasta(path, tmp_path / "esm2.h5", model=str(tiny_model), device="cpu", force_protein=True)
    embed_fasta(path, tmp_path / "out.h5", model=str(small), device="cpu", force_protein=True)
    for name in ("esm2", "out"):
        with read_embeddings(tmp_path / f"{name}.h5") as file:
            assert "kind" not in file.settings and "kind" not in file.attributes
    with pytest.raises(UserError, match="kind: None there, nucleotide now"):
        embed_fasta(path, tmp_path / "out.h5", model=str(small), device="cpu", kind=NUCLEOTIDE)


# --- mistakes --------------------------------------------------------------------------------------------------------


def parts_with(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Have the embedding made of tokens [39, D] and types [2, D] in another way."""
    own = LUCAVIRUS.parts

    def parts(spec: ModelSpec, state: State, device: torch.device) -> Parts:
        return own(spec, state, device)._replace(embedding=change(state["embed_tokens.weight"], state[lucavirus.TYPES]))

    patch.setattr(LUCAVIRUS, "parts", parts)


def rows_of_esm2_zeroed(patch: pytest.MonkeyPatch) -> None:
    def change(tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[[alphabet.PAD, alphabet.MASK]] = 0
        return torch.cat([tokens + row for row in types])

    parts_with(patch, change)


def no_types(patch: pytest.MonkeyPatch) -> None:
    parts_with(patch, lambda tokens, types: torch.cat([tokens, tokens]))


def types_swapped(patch: pytest.MonkeyPatch) -> None:
    parts_with(patch, lambda tokens, types: torch.cat([tokens + row for row in types.flip(0)]))


def ends_without_type(patch: pytest.MonkeyPatch) -> None:
    def change(tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        table = torch.cat([tokens + row for row in types])
        for first in (0, lucavirus.VOCABULARY):
            table[[first + lucavirus.CLS, first + lucavirus.EOS]] = tokens[[lucavirus.CLS, lucavirus.EOS]]
        return table

    parts_with(patch, change)


def scaled_as_esm2(patch: pytest.MonkeyPatch) -> None:
    parts_with(patch, lambda tokens, types: torch.cat([tokens + row for row in types]) * esm2.EMBED_SCALE)


def masks_scaled(patch: pytest.MonkeyPatch) -> None:
    for name in ("READING", "NUCLEOTIDES"):
        patch.setattr(LUCAVIRUS, name, getattr(LUCAVIRUS, name)._replace(scales_masks=True))


def eps_of_the_configuration(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plain, "LAYER_NORM_EPS", 1e-12)


def adjacent_pairs(patch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    patch.setattr(plain, "rotate", rotate)


def last_letter_lost(patch: pytest.MonkeyPatch) -> None:
    """J and stops are X, and U is N."""
    patch.setattr(LUCAVIRUS, "READING", LUCAVIRUS.READING._replace(letters=alphabet.ESM.letters))
    nucleotides = LUCAVIRUS.NUCLEOTIDES
    assert nucleotides is not None
    patch.setattr(LUCAVIRUS, "NUCLEOTIDES", nucleotides._replace(also=nucleotides.also[1:]))


MISTAKES = {
    "rows 1 and 32 zeroed": rows_of_esm2_zeroed, "no type row": no_types, "types swapped": types_swapped,
    "[CLS] and [SEP] without type": ends_without_type, "scaled by .88": scaled_as_esm2, "masks scaled": masks_scaled,
    "eps 1e-12": eps_of_the_configuration, "rotary on adjacent pairs": adjacent_pairs, "letters lost": last_letter_lost,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [pytest.param(kind, mistake, marks=pytest.mark.slow if kind == NUCLEOTIDE and mistake else ())
     for kind in KINDS for mistake in (None, *MISTAKES)
     if (kind, mistake) != (NUCLEOTIDE, "rows 1 and 32 zeroed")],  # nucleotides have neither
)  # fmt: skip
def test_validate_passes_an_honest_run_of_lucavirus_and_fails_every_mistake(
    kind: str, mistake: str | None, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lengths = (40, 150, 90) if mistake is None else (40,)
    path = written(tmp_path / "in.fasta", [*sequences_of(kind, *lengths), *ODD[kind]])
    if mistake is not None:
        MISTAKES[mistake](monkeypatch)
        without_packing(monkeypatch)
    verdict = validate_model(model=str(small), fasta=str(path), device="cpu", kind=kind, token_budget=1024)
    assert verdict.environment["reference"].startswith("lucavirus ")
    failed = {part.split(":")[0] for part in verdict.failed_parts}
    assert failed == set() if mistake is None else "Semantics" in failed


@pytest.mark.slow
def test_validate_passes_lucavirus_in_fp16_with_bits_of_any_company(small: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "in.fasta", [*sequences_of(NUCLEOTIDE, 40, 150, 90, 200), *ODD[NUCLEOTIDE]])
    verdict = validate_model(
        model=str(small), fasta=str(path), kind=NUCLEOTIDE, device="cpu", dtype="fp16", token_budget=1024
    )
    assert verdict.passed, verdict.failed_parts
    packing = [check for check in verdict.checks if check.part.startswith("Packing") and check.limit]
    assert len(packing) == 6 and all(check.limit == "bitwise" and check.worst == 0 for check in packing)


def test_the_oracle_is_found_by_family_and_kind_and_has_an_eps_of_its_own() -> None:
    from lucavirus import LucaVirusConfig, LucaVirusModel

    from virnucpro_cli.validation.lucavirus import OfNucleotides, Reference

    assert oracle_of(SMALL) is Reference and oracle_of(SMALL, NUCLEOTIDE) is OfNucleotides
    model = LucaVirusModel(LucaVirusConfig(hidden_size=256, num_hidden_layers=1, num_attention_heads=2))
    assert {each.eps for each in model.modules() if isinstance(each, torch.nn.LayerNorm)} == {1e-5}


def test_a_checkpoint_of_esm2_is_still_one(tmp_path: Path) -> None:
    spec, *_ = loaded(write_model(tmp_path / "esm2") / "model.safetensors")
    assert spec.family == "esm2"


# --- kernels and other commands --------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_the_fused_steps_are_those_of_lucavirus(kind: str, tmp_path: Path) -> None:
    """Interpreted where there is no GPU, with heads of 128."""
    pytest.importorskip("triton")
    from virnucpro_cli.model.attention import Backend, sdpa, triton
    from virnucpro_cli.model.kernels import fused

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = ModelSpec("a layer", 1, 256, 2, "lucavirus")
    state = weights.random_state(spec, seed=4)
    batch = one_pack(tmp_path, [*ODD[kind][:3], *sequences_of(kind, 40)], 128, families.reading(spec, kind))
    rows = {}
    for name, dtype, backend in (
        ("exact", torch.float32, Backend("sdpa", sdpa.attention, plain)),
        ("plain", torch.float16, Backend("sdpa", sdpa.attention, plain)),
        ("fused", torch.float16, Backend("triton", triton.attention, fused)),
    ):
        rows[name] = embeddings(families.build(spec, state, dtype, device, backend), batch, (0, 1)).residue
    for layer in (0, 1):
        exact = rows["exact"][layer][: batch.used]
        floor = relative_l2(rows["plain"][layer][: batch.used], exact)
        assert relative_l2(rows["fused"][layer][: batch.used], exact) <= 1.5 * floor


@pytest.mark.slow
def test_lucavirus_is_listed_timed_and_exported(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    fetch.show()
    assert "LucaVirus-default-step3.8M" in capsys.readouterr().out
    found = locate.locate("random:lucavirus")
    assert found is not None and found.spec == families.by_name("lucavirus")
    report = bench_model(model=str(small), device="cpu", seconds=1, token_budget=(1024,), peers=("fair-esm",))
    assert any("no peers are timed" in note for note in report.notes)
    path = written(tmp_path / "in.fasta", sequences_of(NUCLEOTIDE, 30, 40))
    embed_fasta(path, tmp_path / "out.h5", model=str(small), kind=NUCLEOTIDE, device="cpu", dtype="fp32")
    export_file(str(tmp_path / "out.h5"), "csv", str(tmp_path / "out.csv"))
    assert "2 sequences" in capsys.readouterr().err and len((tmp_path / "out.csv").read_text().splitlines()) == 3


def test_an_oracle_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "virnucpro_cli.validation.lucavirus")
    monkeypatch.setitem(sys.modules, "lucavirus", None)
    with pytest.raises(UserError, match="lucavirus is not installed") as error:
        oracle_of(SMALL, NUCLEOTIDE)
    assert "virnucpro[test]" in error.value.remedy


@BOTH
def test_an_adapter_of_peft_gives_the_rows_of_pefts_own_forward(kind: str, small: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    parts = ["q_proj", "v_proj", "fc1", "embed_tokens"]
    wrapped = get_peft_model(authors_model().lucavirus, LoraConfig(r=4, lora_alpha=8, target_modules=parts)).eval()
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    path = written(tmp_path / "in.fasta", [*sequences_of(kind, 40), *ODD[kind][-1:]])
    embed_fasta(
        path, tmp_path / "out.h5", model=str(small), adapter=(str(tmp_path / "adapter"),), kind=kind, device="cpu",
        pool=("residue",), layers=(0, 4), store_dtype="fp32", force_protein=kind == PROTEIN,
    )  # fmt: skip
    with read_embeddings(tmp_path / "out.h5") as file:
        for row, (_, text) in enumerate(plain_reader.records(str(path))):
            ids = torch.tensor([reference_of(kind).encode(text.decode().strip())])
            with torch.inference_mode():
                found = wrapped(
                    input_ids=ids, token_type_ids=torch.full_like(ids, kind == PROTEIN), output_hidden_states=True
                )
            for layer in (0, 4):
                assert relative_l2(file.residues(row, layer), found.hidden_states[layer][0, 1:-1]) < 2e-5
    assert validate_model(against=str(tmp_path / "out.h5"), reference_device="cpu").passed
