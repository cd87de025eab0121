#!/usr/bin/env bash
# lucavirus 1.1.1, LucaVirusTokenizer: a protein is read as nucleotides unless seq_type="prot" is said, and proteins may
# hold nucleotides.
#
# A class for both kinds of text could ask for the kind, or tell it from the letters. This one takes "gene" by default:
# each residue but A, C, G, T and U becomes N (9), and no warning says so. With "prot" the letters are residues, but
# nucleotides are written as digits inside, and one vocabulary serves both. So 1 to 5 in a protein are A, T, C, G and N
# (5 to 9), and other digits are unknown (1).
#
# Needs: a Python with pip, and with transformers and PyTorch, which the package imports. Seen (transformers 5.24.0):
#   MKVACLT        -> [2, 9, 9, 9, 5, 7, 9, 6, 3]
#   MKVACLT prot   -> [2, 26, 21, 13, 11, 29, 10, 17, 3]
#   MK15V67 prot   -> [2, 26, 21, 5, 9, 13, 1, 1, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" --no-deps lucavirus==1.1.1
PYTHONPATH="$folder/packages" python - <<'PYTHON'
import sys

from lucavirus import LucaVirusTokenizer

tokenizer = LucaVirusTokenizer()
seen = {
    "MKVACLT": tokenizer.encode("MKVACLT"),
    "MKVACLT prot": tokenizer.encode("MKVACLT", seq_type="prot"),
    "MK15V67 prot": tokenizer.encode("MK15V67", seq_type="prot"),
}
for text, ids in seen.items():
    print(f"{text:14} -> {ids}")
inside = {text: ids[1:-1] for text, ids in seen.items()}
as_nucleotides = [i for letter, i in zip("MKVACLT", inside["MKVACLT"]) if letter not in "ACGTU"]
sys.exit(not (set(as_nucleotides) == {9} and min(inside["MKVACLT prot"]) > 9 and inside["MK15V67 prot"][2:4] == [5, 9]
              and inside["MK15V67 prot"][5:] == [1, 1]))
PYTHON
