"""Programs slow enough to be interrupted, however fast the machine is."""

import time
from pathlib import Path
from typing import Any

from virnucpro_cli.engine import runner

SITE = """
import sys
if any({word!r} in argument for argument in sys.orig_argv):
    import time
    from virnucpro_cli.engine import runner
    compute_with = runner.compute_with
    def slow(*of):
        compute = compute_with(*of)
        return lambda batch: (time.sleep(float(open({pace!r}).read())), compute(batch))[1]
    runner.compute_with = slow
"""


def packs(folder: Path, seconds: float, word: str) -> Path:
    """A folder for PYTHONPATH, in which every pack takes so long in programs with that word in their command.

    Its file `pace` holds the seconds, also for programs that run already.
    """
    folder.mkdir(exist_ok=True)
    (folder / "pace").write_text(str(seconds))
    (folder / "sitecustomize.py").write_text(SITE.format(pace=str(folder / "pace"), word=word))
    return folder


def here(seconds: float) -> None:
    """In this process every pack takes so long."""
    compute_with = runner.compute_with

    def slow(*of: Any) -> Any:
        compute = compute_with(*of)
        return lambda batch: (time.sleep(seconds), compute(batch))[1]

    runner.compute_with = slow
