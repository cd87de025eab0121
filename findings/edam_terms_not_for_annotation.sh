#!/usr/bin/env bash
# EDAM 1.25 (package edam-ontology 1.25.3): 206 of its 2,358 current concepts must not annotate anything, common ones among them.
#
# Tools, workflows and registries (bio.tools, Galaxy, nf-core) name what a tool does by concepts of EDAM. A concept may be
# current, that is not obsolete, and still be marked as not recommended for annotation: it only groups others. A check
# for obsolete concepts passes it. Such are the plain names that one would take first: Alignment, Clustering,
# Classification, Conversion, Visualisation. Their children are meant, such as Sequence classification.
#
# Seen:
#   data 118, format 64, operation 23, topic 1 of 2358
#   Alignment (operation_2928): current, not for annotation
#   Classification (operation_2990): current, not for annotation
#   Clustering (operation_3432): current, not for annotation
#   Sequence classification (operation_2995): current, for annotation
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --no-deps --target "$folder/packages" edam-ontology==1.25.3
PYTHONPATH=$folder/packages python - <<'PYTHON' | tee "$folder/seen"
import collections
import csv

from edam_ontology.streams import tabular_stream

csv.field_size_limit(1 << 24)
kinds = ("data", "format", "operation", "topic")
rows = {row["Class ID"].rpartition("/")[2]: row for row in csv.DictReader(tabular_stream(), delimiter="\t")}
current = {name: row for name, row in rows.items() if name.partition("_")[0] in kinds and row["Obsolete"] == "FALSE"}
groups = [name for name, row in current.items() if row["notRecommendedForAnnotation"]]
counts = collections.Counter(name.partition("_")[0] for name in groups)
print(", ".join(f"{kind} {counts[kind]}" for kind in kinds), "of", len(current))
for name in ("operation_2928", "operation_2990", "operation_3432", "operation_2995"):
    use = "not for annotation" if name in groups else "for annotation"
    print(f"{current[name]['Preferred Label']} ({name}): current, {use}")
PYTHON
diff "$folder/seen" - <<'SEEN'
data 118, format 64, operation 23, topic 1 of 2358
Alignment (operation_2928): current, not for annotation
Classification (operation_2990): current, not for annotation
Clustering (operation_3432): current, not for annotation
Sequence classification (operation_2995): current, for annotation
SEEN
