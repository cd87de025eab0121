"""What registries know the project by, made of pyproject.toml and CITATION.cff: python packaging/identity.py [PAGE]

PAGE: the address of the project's page, for a release: it goes into both files, and into what is made of them.
"""

import argparse
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT, CITATION = "pyproject.toml", "CITATION.cff"
EDAM = "http://edamontology.org/"
TOPICS = {
    "topic_0080": "Sequence analysis",
    "topic_0078": "Proteins",
    "topic_3474": "Machine learning",
    "topic_0781": "Virology",
    "topic_3174": "Metagenomics",
}
FASTA, FASTQ, HDF5 = {"format_1929": "FASTA"}, {"format_1930": "FASTQ"}, {"format_3590": "HDF5"}
SEQUENCES = ({"data_2976": "Protein sequence"}, {"data_2977": "Nucleic acid sequence"})
FEATURES = {"operation_3937": "Feature extraction"}
MATRIX = {"data_2082": "Matrix"}


def terms(*concepts: dict[str, str]) -> list[dict[str, str]]:
    """Concepts of EDAM as bio.tools has them. concepts: term by identifier."""
    return [{"uri": EDAM + name, "term": term} for each in concepts for name, term in each.items()]


def codemeta(project: dict[str, Any], citation: dict[str, Any]) -> dict[str, Any]:
    """The content of codemeta.json, CodeMeta 3.0."""
    page = project["urls"].get("Homepage")
    requirements = [Requirement(text) for text in project["dependencies"]]
    return {
        "@context": "https://w3id.org/codemeta/3.0",
        "type": "SoftwareSourceCode",
        "name": project["name"],
        "description": project["description"],
        "version": project["version"],
        "license": f"https://spdx.org/licenses/{project['license']}",
        **({"url": page, "codeRepository": project["urls"]["Source"]} if page else {}),
        "author": [{"type": "Organization", "name": each["name"]} for each in citation["authors"]],
        "keywords": citation["keywords"],
        "applicationCategory": [EDAM + topic for topic in TOPICS],
        "programmingLanguage": "Python",
        "runtimePlatform": f"Python {project['requires-python']}",
        "operatingSystem": "Linux",
        "softwareRequirements": [
            {"type": "SoftwareApplication", "name": each.name, "version": str(each.specifier)} for each in requirements
        ],
        "citation": [f"https://doi.org/{each['doi']}" for each in citation["references"]],
    }


def biotools(project: dict[str, Any], citation: dict[str, Any]) -> dict[str, Any]:
    """The entry of bio.tools, biotoolsSchema 3. Its homepage, which bio.tools needs, lacks until a release has one."""
    inputs = [{"data": terms(each)[0], "format": terms(FASTA, FASTQ)} for each in SEQUENCES]
    output = {"data": terms(MATRIX)[0], "format": terms(HDF5)}
    page = project["urls"].get("Homepage")
    return {
        "name": project["name"],
        "description": citation["abstract"],
        **({"homepage": page, "link": [{"url": project["urls"]["Source"], "type": ["Repository"]}]} if page else {}),
        "version": [project["version"]],
        "toolType": ["Command-line tool", "Library"],
        "topic": terms(TOPICS),
        "operatingSystem": ["Linux"],
        "language": ["Python"],
        "license": project["license"],
        "maturity": "Emerging",
        "cost": "Free of charge",
        "function": [
            {
                "operation": terms(FEATURES),
                "input": inputs,
                "output": [output],
                "note": "Embeddings of proteins, residues, contigs or nucleotides by a language model.",
                "cmd": "virnucpro embed proteins.fasta -o proteins.h5",
            }
        ],
        "publication": [
            {"doi": each["doi"], "type": ["Other"], "note": "A model that the software runs."}
            for each in citation["references"]
        ],
        "credit": [{"name": each["name"], "typeEntity": "Project"} for each in citation["authors"]],
    }


MADE = {"codemeta.json": codemeta, "packaging/biotools/virnucpro.json": biotools}


def made(project: str, citation: str) -> dict[str, str]:
    """The text of each file that follows from the texts of pyproject.toml and CITATION.cff."""
    parsed = tomllib.loads(project)["project"], yaml.safe_load(citation)
    return {name: json.dumps(make(*parsed), indent=2) + "\n" for name, make in MADE.items()}


def check(page: str) -> None:
    """Raises ValueError for what is no address of a page."""
    parts = urlsplit(page)  # raises it for brackets, too
    wrong = {
        "not http:// or https://": parts.scheme not in ("http", "https"),
        "a character that no address has": not re.fullmatch(r"[!#-;=?-\[\]_a-z~]+", page),
        "a user or a password": "@" in parts.netloc,
        "no host": not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", parts.hostname or ""),
        "no port": parts.netloc.endswith(":") or parts.port == 0,  # port raises it beyond 65535
    }
    if reasons := [reason for reason, is_so in wrong.items() if is_so]:
        raise ValueError(", ".join(reasons))


def with_page(project: str, citation: str, page: str) -> tuple[str, str]:
    """Both texts with the address of the project's page; one that is there goes."""
    urls = f'[project.urls]\nHomepage = "{page}"\nSource = "{page}"\n'
    project = re.sub(r"(?m)^\[project\.urls\]\n(?:[^\[\n].*\n)*", lambda _: urls, project)
    lines = [line for line in citation.splitlines() if not line.startswith("repository-code:")]
    licence = next(i for i, line in enumerate(lines) if line.startswith("license:"))
    lines.insert(licence + 1, f'repository-code: "{page}"')
    return project, "\n".join(lines) + "\n"


def write(root: Path, page: str | None) -> None:
    """Write all files, with a page if there is one: the last thing that is done, when all texts are there."""
    if page is not None:
        try:
            check(page)
        except ValueError as error:
            sys.exit(f"{page!r} is no address of a page: {error}")
    project, citation = ((root / name).read_text() for name in (PYPROJECT, CITATION))
    if page is not None:
        project, citation = with_page(project, citation, page)
    texts = {PYPROJECT: project, CITATION: citation, **made(project, citation)}
    for name, text in texts.items():
        (root / f"{name}.new").write_text(text)
    for name in texts:
        os.replace(root / f"{name}.new", root / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", help="https://...")
    write(ROOT, parser.parse_args().page)
