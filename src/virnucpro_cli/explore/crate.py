"""The RO-Crate of an embeddings file: metadata that say what it is and how it was made. Needs the file alone.

The crate is a folder that holds the file. It follows RO-Crate 1.1 and the profile Process Run Crate 0.5.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from virnucpro_cli import report, store
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.families import by_name, family_of
from virnucpro_cli.store import disk
from virnucpro_cli.store.schema import HALVES

NAME = "ro-crate-metadata.json"
SPECIFICATION, PROFILE = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = [f"{SPECIFICATION}/context", {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}]
"""The terms of 1.1, which has none for a SHA-256."""
HDF5, FASTA = (f"http://edamontology.org/format_{number}" for number in (3590, 1929))
FORMATS = {HDF5: "HDF5", FASTA: "FASTA"}
SPDX = {"MIT": "MIT", "Apache-2.0": "Apache-2.0", "GPL-3.0": "GPL-3.0-only"}
"""Licences of weights that have a page of SPDX, by the names that files have."""
OF_IMPORTS = ("layers", "pool", "store_dtype", "imported")
"""Settings of an imported file that are known; the others say how its own rows would be made."""
ORCID = re.compile(r"(?:(?:https?://)?orcid\.org/)?(\d{4}-\d{4}-\d{4}-\d{3}[\dX])/?", re.IGNORECASE)
REQUIRED = {"PyTorch": ("torch", "https://pytorch.org"), "Python": ("python", "https://www.python.org")}
NOT_STATED = {
    "@id": "#not-stated", "@type": "CreativeWork", "name": "not stated",
    "description": "The licence of these embeddings is not known to the program that made them. "
    "It may depend on those of the sequences and of the model.",
}  # fmt: skip
Entity = dict[str, Any]


def place(folder: str) -> str:
    """The path of the metadata in a crate's folder."""
    return str(Path(folder) / NAME)


def check(folder: str, file: store.EmbeddingFile, agent: str | None, overwrite: bool) -> None:
    """Raise UserError unless the folder can be the crate of the file, and the agent somebody."""
    if agent is not None and not _is_somebody(agent):
        raise UserError(f"--agent {agent!r} is no name and no address.", "Name a person, or give an ORCID's URL.")
    target = Path(place(folder))
    report.check_places({"crate": str(target)}, [file.path, *(entry["path"] for entry in file.inputs)])
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists.", "Name another folder, or --overwrite it.")
    if not file.complete:
        raise UserError(f"{file.path.name} is {store.unfinished(file)}.", "A crate is of a finished file.")
    if _inside(folder, file.path) is None:
        remedy = "A crate is of files in its folder: name that of the file, or one above it."
        raise UserError(f"{file.path} is not in {folder}.", remedy)


def write(folder: str, file: store.EmbeddingFile, methods: str, agent: str | None, overwrite: bool) -> None:
    """Write the metadata into the folder; `check` has seen that it can be. Raises UserError if that fails.

    methods: how the embeddings were made, in words. agent: who ran it, a name or an address such as an ORCID.
    """
    graph: dict[str, Entity] = {}
    for entity in _graph(folder, file, methods, agent):
        graph.setdefault(entity["@id"], entity)  # one file may have been read twice
    text = json.dumps({"@context": CONTEXT, "@graph": list(graph.values())}, indent=2, ensure_ascii=False)
    with store.new_file(Path(place(folder)), overwrite) as out:
        out.write(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode() + b"\n")


def _graph(folder: str, file: store.EmbeddingFile, methods: str, agent: str | None) -> Iterator[Entity]:
    contigs = json.loads(file.attributes.get("contigs", "[]"))
    inputs = list(_texts(folder, file, "input", contigs or file.inputs))
    if "imported" in file.settings:
        inputs.append(_imported(folder, file))
    found = list(_texts(folder, file, "proteins", file.inputs)) if contigs else []  # this run wrote them
    output, licences = _output(folder, file), _licences(file)
    models, settings, software = list(_models(file, licences)), list(_settings(file)), list(_software(file))
    who = _agent(agent, {each["@id"] for each in (*software, *licences)}) if agent else None
    program, *arguments = json.loads(file.attributes["argv"])
    action = {
        "@id": "#run", "@type": "CreateAction", "name": f"{software[0]['name']} {software[0]['softwareVersion']}",
        "description": shlex.join([Path(program).name, *arguments]),
        "instrument": _to(software[0]), "object": _to(*inputs, *models, *settings), "result": _to(output, *found),
        **_times(file), "actionStatus": "http://schema.org/CompletedActionStatus",
        **({"agent": _to(who)} if who else {}),
    }  # fmt: skip
    about: Entity = {"@id": NAME, "@type": "CreativeWork", "about": {"@id": "./"}, "conformsTo": {"@id": SPECIFICATION}}
    root = {
        "@id": "./", "@type": "Dataset", "name": f"Embeddings {output['name']}", "description": methods,
        "datePublished": datetime.now(UTC).date().isoformat(), "license": _to(NOT_STATED),
        "conformsTo": {"@id": PROFILE}, "mentions": _to(action),
        "hasPart": _to(*(each for each in (output, *inputs, *found) if each["@type"] == "File")),
    }  # fmt: skip
    profile = {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    used = {each["@id"] for entity in (output, *inputs, *found) for each in entity["encodingFormat"][1:]}
    formats = [{"@id": each, "@type": "WebSite", "name": name} for each, name in FORMATS.items() if each in used]
    yield from (about, root, profile, output, *inputs, *found, action, *software, *models, *settings, *formats)
    yield from (NOT_STATED, *licences, *([who] if who else []))


def _to(*entities: Entity) -> Any:
    """References to entities: of one the reference itself."""
    found = [{"@id": each} for each in dict.fromkeys(entity["@id"] for entity in entities)]
    return found[0] if len(found) == 1 else found


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _times(file: store.EmbeddingFile) -> Entity:
    """Times when the run began and was finished, by the report's seconds and the moment when the file was laid out.

    Of a run that was resumed that moment is all that is known.
    """
    start = datetime.fromisoformat(str(file.attributes["created"]))
    run = file.report
    seconds = {name: n for name, n in run.get("seconds", {}).items() if name not in run.get("meanwhile", [])}
    if "lay out" not in seconds or "resumed proteins" in run["counts"]:
        return {"startTime": _time(start)}
    at = list(seconds).index("lay out")
    each = list(seconds.values())
    before, after = timedelta(seconds=sum(each[:at])), timedelta(seconds=sum(each[at:]))
    return {"startTime": _time(start - before), "endTime": _time(start + after)}


def _inside(folder: str, path: Path) -> str | None:
    """The path of a file in the folder as the crate names it; None if it is elsewhere. A file that is a link stays."""
    whole, place = Path(folder).resolve(), path.parent.resolve() / path.name
    return quote(os.fsencode(place.relative_to(whole).as_posix())) if place.is_relative_to(whole) else None


def _output(folder: str, file: store.EmbeddingFile) -> Entity:
    status = file.path.stat()
    return {
        "@id": _inside(folder, file.path), "@type": "File", "name": file.path.name,
        "encodingFormat": ["application/x-hdf5", {"@id": HDF5}], "contentSize": str(status.st_size),
        "sha256": disk.sha256(file.path), "dateModified": _time(datetime.fromtimestamp(status.st_mtime, UTC)),
        "license": _to(NOT_STATED),
    }  # fmt: skip


def _texts(folder: str, file: store.EmbeddingFile, name: str, entries: list[Entity]) -> Iterator[Entity]:
    """Sequences that were read: files of the crate where they lie in its folder, otherwise known by their SHA-256.

    entries: path, bytes and sha256 of each.
    """
    for number, entry in enumerate(entries, start=1):
        path, entity = Path(entry["path"]), {"@id": f"#{name}-{number}", "@type": "CreativeWork"}
        for each in (path, file.path.with_name(path.name)):
            if each.is_file() and (place := _inside(folder, each)) and disk.sha256(each) == entry["sha256"]:
                entity = {"@id": place, "@type": "File"}
        yield entity | {
            "name": path.name,
            "encodingFormat": ["text/plain", {"@id": FASTA}],
            "contentSize": str(entry["bytes"]), "sha256": entry["sha256"],
            **({} if entity["@type"] == "File" else {"description": "Text that was read: FASTA, uncompressed."}),
        }  # fmt: skip


def _imported(folder: str, file: store.EmbeddingFile) -> Entity:
    """The source of an imported file: a file of the crate if it lies there, otherwise known by its name."""
    path = Path(str(file.attributes["imported_from"]).rpartition(f" ({file.settings['imported']}")[0])
    place = _inside(folder, path) if path.is_file() else None
    if place is None:
        return {"@id": "#imported", "@type": "CreativeWork", "name": path.name, "encodingFormat": ["unknown"]}
    return {
        "@id": place, "@type": "File", "name": path.name, "encodingFormat": ["application/octet-stream"],
        "contentSize": str(path.stat().st_size), "sha256": disk.sha256(path),
    }  # fmt: skip


def _models(file: store.EmbeddingFile, licences: list[Entity]) -> Iterator[Entity]:
    """The model, the one of a nucleotide half, and adapters. licences: of the model, if any is known."""
    attributes = file.attributes
    name, sha256 = str(attributes["model"]), str(attributes.get("base_sha256", attributes["weights_sha256"]))
    spec = by_name(name.partition(" ")[0]) if attributes.get("weights_origin") == "published" else None
    yield {
        "@id": "#model", "@type": "CreativeWork", "name": name,
        "description": f"Weights: {Path(str(attributes['weights'])).name}",
        **_known(sha256),
        **({"url": f"https://huggingface.co/{family_of(spec).repository(spec)}"} if spec else {}),
        **({"license": _to(*licences)} if licences else {}),
    }  # fmt: skip
    for half in HALVES:
        if half in file.settings:
            sha256 = file.settings[half]["weights_sha256"]
            name = f"the model of /{half}: {json.loads(attributes['config']).get('nucleotide_model', store.UNKNOWN)}"
            yield {"@id": f"#model-{half}", "@type": "CreativeWork", "name": name, **_known(sha256)}
    for number, entry in enumerate(json.loads(attributes.get("adapters", "[]")), start=1):
        name = Path(entry["path"]).name
        yield {"@id": f"#adapter-{number}", "@type": "CreativeWork", "name": name, **_known(entry["sha256"])}


def _known(sha256: str) -> Entity:
    """The SHA-256 of weights; nothing for random weights, or for a file whose weights nobody knows."""
    return {"sha256": sha256} if re.fullmatch("[0-9a-f]{64}", sha256) else {}


def _licences(file: store.EmbeddingFile) -> list[Entity]:
    """The licence of the weights, if the file has one: a name, and in brackets where it stands."""
    name, _, url = str(file.attributes.get("weights_licence", "")).removesuffix(")").partition(" (")
    address = url or (f"https://spdx.org/licenses/{SPDX[name]}" if name in SPDX else f"#{quote(name)}")
    return [{"@id": address, "@type": "CreativeWork", "name": name}] if name else []


def _settings(file: store.EmbeddingFile) -> Iterator[Entity]:
    """Settings that the values depend on, and each environment that computed some."""
    settings = file.settings
    if "imported" in settings:
        settings = {name: value for name, value in settings.items() if name in OF_IMPORTS}
    for name, value in settings.items():
        if not name.endswith("_sha256") and name not in ("unknown", *HALVES) and value != store.UNKNOWN:
            yield _value(name, value)
    for number, environment in enumerate(filter(None, file.environments), start=1):
        yield _value(f"environment-{number}", environment)


def _value(name: str, value: Any) -> Entity:
    words = [f"{key} {each}" for key, each in value.items()] if isinstance(value, dict) else value
    text = ", ".join(map(str, words)) if isinstance(words, list) else words
    return {"@id": f"#{name}", "@type": "PropertyValue", "name": name, "value": text}


def _software(file: store.EmbeddingFile) -> Iterator[Entity]:
    """This program, and what it ran on."""
    there = json.loads(file.attributes["environment"])
    required = [
        {"@id": url, "@type": "SoftwareApplication", "name": name, "url": url, "softwareVersion": there[key]}
        for name, (key, url) in REQUIRED.items()
        if key in there
    ]
    version = str(file.attributes["tool_version"])
    yield {
        "@id": "#virnucpro", "@type": "SoftwareApplication", "name": "virnucpro", "softwareVersion": version,
        **({"softwareRequirements": _to(*required)} if required else {}),
    }  # fmt: skip
    yield from required


def _is_somebody(agent: str) -> bool:
    """Whether a text is a name, or an address that is whole."""
    is_address = re.match("https?:", agent, re.IGNORECASE)
    whole = not is_address or (re.fullmatch(r"https?://[^/\s<>\"]+\.[^\s<>\"]+", agent, re.IGNORECASE) is not None)
    return whole and bool(agent.strip()) and agent.isprintable()


def _agent(text: str, taken: set[str]) -> Entity:
    """A person. An ORCID in any form becomes its URL. taken: addresses of others."""
    orcid = ORCID.fullmatch(text.strip())
    address = f"https://orcid.org/{orcid[1].upper()}" if orcid else text.strip()
    own = address.lower().startswith(("https://", "http://")) and address not in taken
    return {"@id": address if own else "#agent", "@type": "Person", "name": address}
