"""What MultiQC is told of a file, and what an RO-Crate says of it."""

import csv
import hashlib
import json
import os
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import pytest

from virnucpro_cli import cli, store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange.export import export_file
from virnucpro_cli.exchange.importing import import_file
from virnucpro_cli.explore import crate
from virnucpro_cli.explore import multiqc as sections
from virnucpro_cli.explore.inspect import inspect_file
from virnucpro_cli.store import read_embeddings

FASTA = ">a first\nMKVLAGW\n>b\nMKVLAGWMKVLAGW\n>empty\n\n>odd\nMK*LAG\n>long\n" + "ACDEFGHIKL" * 20 + "\n"
MULTIQC = {f"out_virnucpro_{name}_mqc.json" for name in ("stats", "records", "lengths")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "in.fasta").write_text(FASTA)
    embed_fasta(
        folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu", pool=("mean", "max"),
        max_residues=100, invalid="skip", qc=str(folder / "out.tsv"),
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder with the output alone; its FASTA stays where the file says."""
    shutil.copy(made / "out.h5", tmp_path)
    return tmp_path


def multiqc(path: Path, folder: Path) -> dict[str, Any]:
    """The files that MultiQC reads, by section."""
    inspect_file(str(path), multiqc_folder=str(folder))
    return {path.name.split("_")[2]: json.loads(path.read_text()) for path in folder.glob("*_mqc.json")}


def described(folder: Path, **options: Any) -> dict[str, Any]:
    """Entities of the crate in the folder, by their @id."""
    inspect_file(str(folder / "out.h5"), crate_folder=str(folder), overwrite=True, **options)
    graph = json.loads((folder / crate.NAME).read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph)
    return entities


# --- MultiQC ----------------------------------------------------------------------------------------------------------


def test_multiqc_is_told_the_numbers_of_a_sample(folder: Path, tiny_model: Path) -> None:
    files = multiqc(folder / "out.h5", folder)
    assert {path.name for path in folder.glob("*_mqc*")} == MULTIQC
    with read_embeddings(folder / "out.h5") as file:
        report = file.report
    assert files["stats"]["plot_type"] == "generalstats"
    assert files["stats"]["data"]["out"] == {
        "records": 5, "skipped": 2, "cut": 1, "tokens/s": report["rates"]["tokens/s"],
        "density": report["packing"]["density"], "model": tiny_model.name,
    }  # fmt: skip
    assert [name for column in files["stats"]["pconfig"] for name in column] == list(files["stats"]["data"]["out"])


def test_every_record_is_in_one_bar_of_each_chart_as_the_quality_table_has_it(folder: Path, made: Path) -> None:
    files = multiqc(folder / "out.h5", folder)
    with open(made / "out.tsv", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    records, lengths = (files[section]["data"]["out"] for section in ("records", "lengths"))
    assert sum(records.values()) == sum(lengths.values()) == len(rows)
    assert records["cut"] == sum(row["truncated"] == "1" for row in rows) == 1
    for reason in ("empty", "invalid residues"):
        assert records[f"skipped: {reason}"] == sum(row["reason"] == reason for row in rows) == 1
    assert {name: n for name, n in lengths.items() if n} == {"0-49": 4, "200-399": 1}
    for section in ("records", "lengths"):
        assert files[section]["parent_id"] == "virnucpro" and files[section]["plot_type"] == "bargraph"
        assert list(files[section]["categories"]) == list(files[section]["data"]["out"])


def test_a_partial_file_has_pending_records_and_no_rates(folder: Path) -> None:
    partial = folder / "out.h5.partial"
    (folder / "out.h5").rename(partial)
    with h5py.File(partial, "r+") as file:
        file["status"][0] = store.PENDING
        file["run/complete"][()] = 0
        file["run/report"][()] = b""
    files = multiqc(partial, folder)
    assert files["records"]["data"]["out"]["pending"] == 1
    assert "tokens/s" not in files["stats"]["data"]["out"]


def test_files_for_multiqc_are_replaced_and_those_of_others_are_not(folder: Path) -> None:
    multiqc(folder / "out.h5", folder)
    multiqc(folder / "out.h5", folder)
    other = folder / "out_virnucpro_stats_mqc.json"
    other.write_text('{"id": "mine"}')
    with pytest.raises(UserError, match="--overwrite"):
        multiqc(folder / "out.h5", folder)
    assert other.read_text() == '{"id": "mine"}'
    inspect_file(str(folder / "out.h5"), multiqc_folder=str(folder), overwrite=True)
    assert "virnucpro_stats" in other.read_text()


def test_samples_of_one_name_are_told_apart_by_their_files(folder: Path, made: Path, tiny_model: Path) -> None:
    before = multiqc(folder / "out.h5", folder)
    (folder / "other").mkdir()
    (folder / "other" / "in.fasta").write_text(">z\nMKV\n")
    embed_fasta(folder / "other" / "in.fasta", folder / "other" / "out.h5", model=str(tiny_model), device="cpu")
    with pytest.raises(UserError, match="is of another file of this name"):
        multiqc(folder / "other" / "out.h5", folder)
    assert multiqc(folder / "out.h5", folder) == before
    inspect_file(str(folder / "other" / "out.h5"), multiqc_folder=str(folder), overwrite=True)
    assert json.loads((folder / "out_virnucpro_stats_mqc.json").read_text())["data"]["out"]["records"] == 1


@pytest.mark.parametrize(
    ("name", "sample"), [("x.hdf5", "x"), ("a b.h5.partial", "a b"), ("<b>&'.h5", "_b___"), ("a|\x1b.h5", "a|?")]
)
def test_a_sample_has_the_name_of_its_file_as_a_page_may_show_it(name: str, sample: str) -> None:
    assert sections.sample_of(name) == sample


# --- RO-Crate ---------------------------------------------------------------------------------------------------------


def test_the_crate_knows_the_output_by_its_bytes(folder: Path) -> None:
    entities = described(folder)
    output, path = entities["out.h5"], folder / "out.h5"
    assert output["@type"] == "File" and output["contentSize"] == str(path.stat().st_size)
    assert output["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entities["./"]["hasPart"] == {"@id": "out.h5"}
    assert entities[crate.NAME]["about"] == {"@id": "./"}


def test_every_reference_of_the_crate_leads_to_an_entity(folder: Path) -> None:
    entities = described(folder, agent="Ada Lovelace")

    def references(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(references, value))
        return {value["@id"]} if isinstance(value, dict) else set()

    named = set().union(*(references(value) for entity in entities.values() for value in entity.values()))
    assert named - entities.keys() == {crate.SPECIFICATION}
    assert entities.keys() - named == {crate.NAME}


def test_the_crate_says_how_the_file_was_made(folder: Path, made: Path, tiny_model: Path) -> None:
    entities = described(folder)
    action, model = entities["#run"], entities["#model"]
    with read_embeddings(folder / "out.h5") as file:
        sha256, created = str(file.attributes["weights_sha256"]), str(file.attributes["created"])
        torch = file.environments[0]["torch"]
    assert model["sha256"] == sha256 and "license" not in model  # nobody knows it
    assert entities["#virnucpro"]["softwareVersion"] and entities["https://pytorch.org"]["softwareVersion"] == torch
    assert (entities["#pool"]["value"], entities["#max_residues"]["value"]) == ("mean, max", 100)
    start, end = (datetime.fromisoformat(action[name]) for name in ("startTime", "endTime"))
    laid_out = datetime.fromisoformat(created)
    assert laid_out - timedelta(minutes=10) < start <= laid_out < end + timedelta(seconds=1)
    given = {each["@id"] for each in action["object"]}
    assert {"#input-1", "#model", "#pool", "#environment-1"} <= given and action["result"] == {"@id": "out.h5"}
    assert "agent" not in action
    assert "not known" in entities[entities["./"]["license"]["@id"]]["description"]


def test_an_input_is_a_file_of_the_crate_where_it_is_the_one_that_was_read(folder: Path, made: Path) -> None:
    sha256 = hashlib.sha256(FASTA.encode()).hexdigest()
    assert described(folder)["#input-1"]["sha256"] == sha256
    (folder / "in.fasta").write_text(FASTA)
    entities = described(folder)
    assert (entities["in.fasta"]["@type"], entities["in.fasta"]["sha256"]) == ("File", sha256)
    assert {"@id": "in.fasta"} in entities["./"]["hasPart"] and "#input-1" not in entities
    (folder / "in.fasta").write_text(FASTA + "A")
    assert "#input-1" in described(folder)


def test_proteins_of_contigs_are_a_result_and_the_contigs_the_input(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "contigs.fna").write_text(">c\n" + "GCTATGAAAGTTCTGGCTGGTTGG" * 30 + "\n")
    embed_fasta(
        tmp_path / "contigs.fna", tmp_path / "out.h5", model=str(tiny_model), device="cpu", from_="contigs",
        genes="virnucpro",
    )  # fmt: skip
    entities = described(tmp_path)
    action = entities["#run"]
    assert {"@id": "contigs.fna"} in action["object"]
    assert [each["@id"] for each in action["result"]] == ["out.h5", "out.proteins.faa"]
    assert entities["#gene_caller"]["value"].startswith("name virnucpro, version")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("MIT", "https://spdx.org/licenses/MIT"),
        ("Cambrian Open (https://example.org/terms)", "https://example.org/terms"),
        ("Another One", "#Another%20One"),
    ],
)
def test_the_licence_of_the_weights_is_the_files(text: str, address: str, folder: Path) -> None:
    with h5py.File(folder / "out.h5", "r+") as file:
        file.attrs["weights_licence"] = text
    entities = described(folder)
    assert entities["#model"]["license"] == {"@id": address} and entities[address]["name"] == text.partition(" (")[0]


def test_a_run_that_was_resumed_has_no_end_that_its_report_knows(folder: Path) -> None:
    with h5py.File(folder / "out.h5", "r+") as file:
        report = json.loads(file["run/report"][()])
        report["counts"]["resumed proteins"] = 1
        file["run/report"][()] = json.dumps(report).encode()
    assert "endTime" not in described(folder)["#run"]


def test_an_agent_is_a_name_or_an_address(folder: Path) -> None:
    assert described(folder, agent="Ada Lovelace")["#agent"]["name"] == "Ada Lovelace"
    orcid = "https://orcid.org/0000-0002-1825-0097"
    assert described(folder, agent=orcid)["#run"]["agent"] == {"@id": orcid}


@pytest.mark.parametrize(
    ("agent", "address"),
    [("http://orcid.org/0000-0002-1825-0097/", "https://orcid.org/0000-0002-1825-0097"),
     ("0000-0002-1694-233x", "https://orcid.org/0000-0002-1694-233X"), ("https://pytorch.org", "#agent")],
)  # fmt: skip
def test_an_agent_has_an_address_of_its_own(folder: Path, agent: str, address: str) -> None:
    entities = described(folder, agent=agent)
    assert entities["#run"]["agent"] == {"@id": address} and entities[address]["@type"] == "Person"


@pytest.mark.parametrize("agent", ["", " ", "https://", "https://orcid.org/0000 0002", "https://x y/<z>", "Ada\nL"])
def test_an_agent_that_is_nobody_is_refused(folder: Path, agent: str) -> None:
    with pytest.raises(UserError, match="is no name and no address"):
        described(folder, agent=agent)


def test_names_that_are_no_text_are_described(folder: Path, tiny_model: Path) -> None:
    fasta, output = (os.fsdecode(os.fsencode(folder) + name) for name in (b"/caf\xe9.faa", b"/p\xff.h5"))
    Path(fasta).write_text(">a\nMKV\n")
    embed_fasta(fasta, output, model=str(tiny_model), device="cpu")
    inspect_file(output, crate_folder=str(folder), multiqc_folder=str(folder))
    graph = {entity["@id"]: entity for entity in json.loads((folder / crate.NAME).read_text())["@graph"]}
    assert graph["p%FF.h5"]["name"] == "p\ufffd.h5" and graph["caf%E9.faa"]["name"] == "caf\ufffd.faa"


def test_an_input_that_was_read_twice_is_one_entity(folder: Path, tiny_model: Path) -> None:
    (folder / "in.fasta").write_text(FASTA)
    twice = [str(folder / "in.fasta")] * 2
    embed_fasta(twice, folder / "out.h5", model=str(tiny_model), device="cpu", overwrite=True)
    assert described(folder)["./"]["hasPart"] == [{"@id": "out.h5"}, {"@id": "in.fasta"}]


def test_a_crate_is_never_overwritten_unless_asked(folder: Path) -> None:
    (folder / crate.NAME).write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        inspect_file(str(folder / "out.h5"), crate_folder=str(folder))
    assert (folder / crate.NAME).read_text() == "{}"
    assert described(folder)["out.h5"]
    assert {path.name for path in folder.iterdir()} == {"out.h5", crate.NAME}


def test_a_crate_holds_its_file_at_any_depth(made: Path, tmp_path: Path) -> None:
    inner, other = tmp_path / "a b", tmp_path / "other"
    inner.mkdir()
    other.mkdir()
    shutil.copy(made / "out.h5", inner)
    with pytest.raises(UserError, match="is not in"):
        inspect_file(str(inner / "out.h5"), crate_folder=str(other))
    inspect_file(str(inner / "out.h5"), crate_folder=str(tmp_path))
    assert '"@id": "a%20b/out.h5"' in (tmp_path / crate.NAME).read_text()


def test_an_imported_file_is_described_as_far_as_it_is_known(made: Path, folder: Path) -> None:
    export_file(str(made / "out.h5"), "keyed-h5", str(folder / "keyed.h5"))
    import_file(str(folder / "keyed.h5"), str(folder / "out.h5"), model="8M", overwrite=True)
    entities = described(folder)
    assert entities["./"]["description"].startswith("Imported from ")
    source = entities["keyed.h5"]
    assert source["sha256"] == hashlib.sha256((folder / "keyed.h5").read_bytes()).hexdigest()
    assert {"@id": "keyed.h5"} in entities["#run"]["object"]
    known = {"#layers", "#pool", "#store_dtype", "#imported"}
    assert {name for name, each in entities.items() if each["@type"] == "PropertyValue"} == known
    assert "description" in entities["#model"] and "#attention" not in entities and "endTime" not in entities["#run"]
    assert multiqc(folder / "out.h5", folder)["stats"]["data"]["out"].keys() == {"records", "skipped", "cut", "model"}


def test_a_crate_is_of_a_finished_file(folder: Path) -> None:
    with h5py.File(folder / "out.h5", "r+") as file:
        file["run/complete"][()] = 0
    with pytest.raises(UserError, match="unfinished"):
        inspect_file(str(folder / "out.h5"), crate_folder=str(folder))


def test_the_options_of_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = str(folder)
    for arguments, code in (
        (["--multiqc", there, "--ro-crate", there, "--agent", "Ada"], 0),
        (["--ro-crate", there], 2),
        (["--ro-crate", there, "--overwrite"], 0),
        (["--agent", "Ada"], 2),
        (["--multiqc", f"{there}/missing"], 2),
        (["--multiqc", ""], 2),
        (["--ro-crate", ""], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", f"{there}/out.h5", *arguments])
        assert ended.value.code == code, capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"out.h5", crate.NAME, *MULTIQC}
