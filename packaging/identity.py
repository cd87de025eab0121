"""What registries know the project by, made of pyproject.toml and CITATION.cff: python packaging/identity.py [PAGE]

PAGE: the address of the project's page, for a release: it goes into both files, and into what is made of them.
"""

import json
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


def made(root: Path) -> dict[str, str]:
    """The text of each file that follows from pyproject.toml and CITATION.cff of a checkout."""
    project = tomllib.loads((root / PYPROJECT).read_text())["project"]
    citation = yaml.safe_load((root / CITATION).read_text())
    return {name: json.dumps(make(project, citation), indent=2) + "\n" for name, make in MADE.items()}


def fill_in(root: Path, page: str) -> None:
    """Put the address of the project's page into pyproject.toml and CITATION.cff; one that is there goes."""
    parts = urlsplit(page)
    if parts.scheme != "https" or not parts.netloc or re.search(r'[\s"\\]', page):
        sys.exit(f"{page} is no address of a page: https://...")
    urls = f'[project.urls]\nHomepage = "{page}"\nSource = "{page}"\n'
    text = (root / PYPROJECT).read_text()
    (root / PYPROJECT).write_text(re.sub(r"(?m)^\[project\.urls\]\n(?:[^\[\n].*\n)*", lambda _: urls, text))
    lines = [line for line in (root / CITATION).read_text().splitlines() if not line.startswith("repository-code:")]
    lines.insert(
        next(i for i, line in enumerate(lines) if line.startswith("license:")) + 1, f'repository-code: "{page}"'
    )
    (root / CITATION).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for address in sys.argv[1:]:
        fill_in(ROOT, address)
    for path, content in made(ROOT).items():
        (ROOT / path).write_text(content)
