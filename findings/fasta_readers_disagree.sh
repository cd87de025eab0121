#!/usr/bin/env bash
# Biopython 1.86 (SimpleFastaParser), fair-esm 2.0.0 (read_fasta) and pyfaidx 0.9.0.4 read the same FASTA differently.
#
# The file has four things that FASTA files of old databases and of editors hold: a comment line (";"), a space in a
# sequence, an empty line in a record, and a stop ("*").
# - Biopython and fair-esm take a comment line between two records for residues of the first.
# - Biopython drops the spaces of a sequence; fair-esm keeps them in the string, so its length is off by them.
# - Biopython and fair-esm join a record over an empty line; pyfaidx refuses the file for it.
# - All keep the stop as a letter.
#
# Needs: a Python with PyTorch and NumPy, which fair-esm imports. Seen:
#   comment: Biopython MKVLAG;acomment, fair-esm MKVLAG; a comment
#   space: Biopython MKVLAG, fair-esm MKV LAG
#   empty line: Biopython MKVLAG, fair-esm MKVLAG, pyfaidx FastaIndexingError
#   stop: Biopython MKV*, fair-esm MKV*, pyfaidx MKV*
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --no-deps --target "$folder/packages" biopython==1.86 fair-esm==2.0.0 pyfaidx==0.9.0.4
cat > "$folder/read.py" <<'PYTHON'
import os
import sys

import pyfaidx
from Bio.SeqIO.FastaIO import SimpleFastaParser
from esm.data import read_fasta


def biopython(path):
    with open(path) as file:
        return dict(SimpleFastaParser(file))["a"]


def fair_esm(path):
    return dict(read_fasta(path))["a"]


def indexed(path):
    try:
        return str(pyfaidx.Fasta(path)["a"])
    except pyfaidx.FastaIndexingError as error:
        return type(error).__name__


TEXTS = {
    "comment": (">a\nMKVLAG\n; a comment\n>b\nMK\n", "MKVLAG;acomment", "MKVLAG; a comment", None),
    "space": (">a\nMKV LAG\n>b\nMK\n", "MKVLAG", "MKV LAG", None),
    "empty line": (">a\nMKV\n\nLAG\n>b\nMK\n", "MKVLAG", "MKVLAG", "FastaIndexingError"),
    "stop": (">a\nMKV*\n>b\nMK\n", "MKV*", "MKV*", "MKV*"),
}
changed = False
for number, (what, (text, *expected)) in enumerate(TEXTS.items()):
    path = os.path.join(sys.argv[1], f"{number}.fasta")
    with open(path, "w") as file:
        file.write(text)
    readers = {"Biopython": biopython, "fair-esm": fair_esm, "pyfaidx": indexed}
    wanted = {name: word for name, word in zip(readers, expected) if word is not None}
    found = {name: readers[name](path) for name in wanted}
    print(f"{what}:", ", ".join(f"{name} {word}" for name, word in found.items()))
    changed |= found != wanted
sys.exit(changed)
PYTHON
PYTHONPATH="$folder/packages" python "$folder/read.py" "$folder"
