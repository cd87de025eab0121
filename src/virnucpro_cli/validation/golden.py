"""Goldens: the reference's rows of three shipped proteins, written once and compared ever after."""

import json
from importlib.metadata import version

import numpy as np
import torch

from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.errors import UserError, absent
from virnucpro_cli.model import locate
from virnucpro_cli.validation import agreement
from virnucpro_cli.validation.gates import SEMANTICS_GATES
from virnucpro_cli.validation.oracle import Rows, Sample
from virnucpro_cli.validation.verdict import Check

RECORDS = ("edge:ambiguous", "edge:lower_case_and_stop", "edge:masked")


def check(config: ValidateConfig, found: locate.Weights, fast: Rows, truth: Rows, sample: Sample) -> list[Check]:
    """Write or compare the reference's mean and bos rows of three shipped proteins; the file names weights and layers."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    rows = [sample.names.index(name) for name in RECORDS]
    mine = {f"{kind}/{layer}": values[rows].astype(np.float32)
            for (kind, layer), values in truth.items() if kind != "residue"}  # fmt: skip
    if config.write_golden:
        about = {
            "model": found.name, "weights_sha256": found.sha256, "layers": json.dumps([layer for kind, layer in truth if kind == "mean"]),
            "records": json.dumps(RECORDS), "torch": torch.__version__, "fair-esm": version("fair-esm"),
            "what": "fair-esm in float32, one protein at a time",
        }  # fmt: skip
        save_file(mine, config.write_golden, about)
    if not config.golden:
        return []
    part = "Golden: stored rows of the reference"
    try:
        with safe_open(config.golden, "np") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{absent(config.golden)}.", "virnucpro validate --write-golden FILE makes one.") from None
    except Exception as cause:  # of safetensors: damaged or absent
        raise UserError(f"The golden file {config.golden} cannot be read: {cause}.") from None
    wrong = ["records"] if about.get("records") != json.dumps(RECORDS) else []
    shapes = [name for name, values in stored.items() if name in mine and values.shape != mine[name].shape]
    if wrong or shapes or not stored:
        raise UserError(
            f"{config.golden} is not a golden of this version: {', '.join(wrong + shapes) or 'it is empty'}.",
            "Write it again with --write-golden.",
        )
    missing = sorted(mine.keys() - stored.keys())
    same = about.get("weights_sha256") == found.sha256
    checks = [
        Check(part, "SHA-256 of the weights", same, note="" if same else "other weights"),
        Check(part, "kinds and layers", not missing, note=f"{', '.join(missing)} not in it" if missing else ""),
    ]
    for name in sorted(stored.keys() & mine.keys()):
        kind, _, layer = name.partition("/")
        for what, values in (("reference", mine[name]), ("embed in fp32", fast[kind, int(layer)][rows])):
            error = agreement.relative_l2(values, stored[name])
            checks.append(Check(
                part, f"{what}: {kind}, layer {layer}", bool(error.max() <= SEMANTICS_GATES[kind]),
                median=float(np.median(error)), worst=float(error.max()), limit=f"{SEMANTICS_GATES[kind]:.0e}",
                record=RECORDS[int(error.argmax())],
            ))  # fmt: skip
    return checks
