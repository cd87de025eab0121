# CITATION.cff by cffconvert, codemeta.json by the terms of CodeMeta, the entry of bio.tools and the recipes by those of EDAM.
# pip: cffconvert==2.0.0 codemetapy==3.0.4 rdflib==7.6.0 edam-ontology==1.25.3
cffconvert --validate -i CITATION.cff
env -u PYTHONPATH python - <<'PYTHON'
import csv
import json
import re
from pathlib import Path

import codemeta
from edam_ontology.streams import tabular_stream
from rdflib import Graph, Namespace, RDF

terms = json.loads((Path(codemeta.__file__).parent / "schema" / "codemeta.jsonld").read_text())["@context"]
written = json.loads(Path("codemeta.json").read_text())
assert written.pop("@context") == "https://w3id.org/codemeta/3.0"


def nodes(value):
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            yield each
            for inner in each.values():
                yield from nodes(inner)


for node in nodes(written):
    assert {*node, node["type"]} <= terms.keys(), (node, {*node, node["type"]} - terms.keys())
graph = Graph().parse(data=json.dumps({"@context": terms, **written}), format="json-ld")
schema = Namespace("http://schema.org/")
(software,) = graph.subjects(RDF.type, schema.SoftwareSourceCode)
assert str(graph.value(software, schema.license)) == "https://spdx.org/licenses/MIT"
assert len(list(graph.objects(software, schema.softwareRequirements))) == len(written["softwareRequirements"])
print(len(graph), "statements in codemeta.json")

csv.field_size_limit(1 << 24)
known = {row["Class ID"]: row for row in csv.DictReader(tabular_stream(), delimiter="\t")}
entry = json.loads(Path("packaging/biotools/virnucpro.json").read_text())
concepts = [node for node in nodes(entry) if "uri" in node]
for concept in concepts:
    row = known[concept["uri"]]
    assert (row["Preferred Label"], row["Obsolete"]) == (concept["term"], "FALSE"), concept
    assert not row["notRecommendedForAnnotation"], concept
print(len(concepts), "concepts of EDAM")
recipes = [path for ending in ("xml", "yml") for path in Path("packaging").rglob(f"*.{ending}")]
used = {name for path in recipes for name in re.findall(r"\b(?:topic|operation|data|format)_\d{4}\b", path.read_text())}
for name in used:
    row = known[f"http://edamontology.org/{name}"]
    assert (row["Obsolete"], row["notRecommendedForAnnotation"]) == ("FALSE", ""), (name, row["Preferred Label"])
assert any(name.startswith("operation_") for name in used)
print(len(used), "concepts of EDAM in recipes")
PYTHON
