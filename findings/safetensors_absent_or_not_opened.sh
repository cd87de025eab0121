#!/usr/bin/env bash
# safetensors 0.8.0, safe_open and load_file: a file that is there is called absent if the system will not open it.
#
# Long runs with many shards and inputs reach their limit of open files now and then. We took it that the error would be
# the system's, with its number: `OSError: [Errno 24] Too many open files`, as `open` of Python has it. It is
# FileNotFoundError, `No such file or directory`, and its errno is None. So whoever tells people what to do about weights
# that cannot be read must open the file before, or sends them to fetch what they have.
#
# Needs: a Python with pip and NumPy. Seen:
#   open: OSError, errno 24
#   safe_open: FileNotFoundError, errno None, says that there is no such file
#   load_file: FileNotFoundError, errno None, says that there is no such file
#   with one descriptor free again: ['weight']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" --no-deps safetensors==0.8.0
cat > "$folder/show.py" <<'PYTHON'
import os
import resource
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

path = sys.argv[1]
save_file({"weight": np.zeros((2, 3), np.float32)}, path)
load_file(path)
resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass

told = []
for name, call in (("open", open), ("safe_open", lambda path: safe_open(path, "np")), ("load_file", load_file)):
    try:
        call(path)
        told.append(f"{name}: opened")
    except OSError as error:
        absent = ", says that there is no such file" if "No such file" in str(error) else ""
        told.append(f"{name}: {type(error).__name__}, errno {error.errno}{absent}")
os.close(taken.pop())
told.append(f"with one descriptor free again: {list(load_file(path))}")
print(*told, sep="\n")
expected = [
    "open: OSError, errno 24",
    "safe_open: FileNotFoundError, errno None, says that there is no such file",
    "load_file: FileNotFoundError, errno None, says that there is no such file",
    "with one descriptor free again: ['weight']",
]
sys.exit(told != expected)
PYTHON
PYTHONPATH="$folder/packages" python "$folder/show.py" "$folder/weights.safetensors"
