#!/usr/bin/env bash
# peft 0.21.2, LoraConfig(target_parameters=...): the file does not say which matrix a factor belongs to, and a pattern
# that a warning calls ignored is used.
#
# A module with two matrices as parameters has its adapters one in the other. The saved keys are those of the module,
# with `base_layer` for the inner one. We took it that the list gives the order. The order is that of the module's own
# parameters, whatever the list says, so only shapes tell a reader of the file which is which. A key of alpha_pattern is
# compared with the name of the parameter, which is in no saved key. It is heeded, and `RuntimeWarning: The following
# alpha_pattern keys did not match any targeted module and were ignored` names it all the same. The key of the module
# itself is not heeded, and named too.
#
# Needs: a Python with pip, and with PyTorch, transformers and accelerate, which peft imports. Seen:
#   ['up', 'down']: inner (6, 4), outer (4, 6)
#   ['down', 'up']: inner (6, 4), outer (4, 6)
#   scale of up with alpha 8, rank 2: 4.0, with {'up': 20}: 10.0, with {'inner': 20}: 4.0; said to be ignored: up, inner
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install -q --target "$folder/packages" --no-deps peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import re
import sys
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(6, 4))
        self.down = torch.nn.Parameter(torch.randn(4, 6))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()


def wrapped(targets, **settings):
    config = peft.LoraConfig(target_modules=[], target_parameters=targets, r=2, lora_alpha=8, **settings)
    return peft.get_peft_model(Model(), config)


seen = []
for targets in (["up", "down"], ["down", "up"]):
    folder = Path(sys.argv[1]) / "-".join(targets)
    wrapped(targets).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")

    def shape(path):
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        return b.shape[0], a.shape[1]

    seen.append((shape("inner.base_layer"), shape("inner")))
    print(f"{targets}: inner {seen[-1][0]}, outer {seen[-1][1]}")
scales, ignored = [], []
for pattern in ({}, {"up": 20}, {"inner": 20}):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrapped(["up"], alpha_pattern=pattern)
    scales.append(model.base_model.model.inner.scaling["default"])
    said = " ".join(str(each.message) for each in caught)
    ignored += [key for key in pattern if "alpha_pattern keys did not match" in said and re.search(f"'{key}'", said)]
print(
    f"scale of up with alpha 8, rank 2: {scales[0]}, with {{'up': 20}}: {scales[1]}, with {{'inner': 20}}: {scales[2]}; "
    f"said to be ignored: {', '.join(ignored)}"
)
sys.exit(seen != [((6, 4), (4, 6))] * 2 or scales != [4.0, 10.0, 4.0] or ignored != ["up", "inner"])
PYTHON
PYTHONPATH="$folder/packages" python "$folder/show.py" "$folder"
