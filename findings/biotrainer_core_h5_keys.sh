#!/usr/bin/env bash
# biotrainer-core 2.0.0, write_h5_db: the keys of its HDF5 file are HASH_MODEL, and no name of a protein is in it.
#
# biotrainer 1.x wrote a dataset under the SHA-256 of `{sequence}_{length}`, with the protein's name in `original_id`. We
# took it that its successor keeps that layout. It puts the model behind the hash, with `/` as `_`, and the hash alone in the
# attribute sequence_hash. The shape does not tell rows of residues from a mean, as a protein of one residue shows: the
# attribute reduced does. If a protein has both, only its residues are written.
#
# Needs: a Python with pip. Seen:
#   key: HASH_Rostlab_prot_t5, original_id: False
#   one residue: (1, 4) reduced False; mean: (4,) reduced True; both: (5, 4) reduced False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" biotrainer-core==2.0.0
cat > "$folder/write.py" <<'PYTHON'
import sys
from datetime import datetime

import h5py
import numpy as np
from biotrainer_core.functions.hashing import calculate_sequence_hash
from biotrainer_core.h5_files import write_h5_db
from biotrainer_core.h5_files.emb_db_dto import EmbeddingDatabaseDTO

path, now, model = sys.argv[1], datetime.now(), "Rostlab/prot_t5"
mean, of = np.zeros(4, np.float32), lambda text: np.zeros((len(text), 4), np.float32)
given = {"M": (None, of("M")), "MKV": (mean, None), "MKVLA": (mean, of("MKVLA"))}
keys = {text: calculate_sequence_hash(text) for text in given}
list(write_h5_db(path, [
    EmbeddingDatabaseDTO(keys[text], len(text), 0, now, now, model, *each, True) for text, each in given.items()
]))
with h5py.File(path) as file:
    right = set(file) == {f"{key}_Rostlab_prot_t5" for key in keys.values()}
    named = any("original_id" in data.attrs for data in file.values())
    one, alone, both = (file[f"{keys[text]}_Rostlab_prot_t5"] for text in given)
    print(f"key: {'HASH_Rostlab_prot_t5' if right else list(file)}, original_id: {named}")
    print("; ".join(
        f"{name}: {data.shape} reduced {bool(data.attrs['reduced'])}"
        for name, data in (("one residue", one), ("mean", alone), ("both", both))
    ))
    shapes = [(each.shape, bool(each.attrs["reduced"])) for each in (one, alone, both)]
sys.exit(not right or named or shapes != [((1, 4), False), ((4,), True), ((5, 4), False)])
PYTHON
PYTHONPATH="$folder/packages" python "$folder/write.py" "$folder/db.h5"
