#!/usr/bin/env bash
# pyrodigal 3.7.1, metagenomic mode: a contig of nothing but N holds a gene, of nothing but X.
#
# An assembler writes N where it knows the length of a gap and not its bases. We took it that no gene is found where no
# base is known. The gene finder reads N as a base like others, meets no stop codon in it, and reports an open reading
# frame from end to end. With mask=True the same contig has none.
#
# Needs: a Python with pip. Seen:
#   as it comes: 1 gene, of 1000 residues, 1000 of them X
#   mask=True: 0 genes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" pyrodigal==3.7.1
cat > "$folder/find.py" <<'PYTHON'
import sys

import pyrodigal

contig = "N" * 3000
found = pyrodigal.GeneFinder(meta=True).find_genes(contig)
masked = pyrodigal.GeneFinder(meta=True, mask=True).find_genes(contig)
proteins = [gene.translate() for gene in found]
for protein in proteins:
    print(f"as it comes: {len(proteins)} gene, of {len(protein)} residues, {protein.count('X')} of them X")
print(f"mask=True: {len(masked)} genes")
sys.exit(proteins != ["X" * 1000] or len(masked) > 0)
PYTHON
PYTHONPATH="$folder/packages" python "$folder/find.py"
