"""Plain FASTA files beside those that are embedded: read by name, and written."""

from pathlib import Path
from typing import Any


def by_name(path: str | Path) -> Any:
    """Random access by name to a plain FASTA file: a `pyfaidx.Fasta` (which writes an index beside the file)."""
    import pyfaidx

    return pyfaidx.Fasta(str(path), as_raw=True, sequence_always_upper=True, duplicate_action="first")


def write_texts(path: Path, texts: list[bytes]) -> Path:
    """A FASTA of sequence texts as they stand, named by their numbers."""
    with open(path, "wb") as file:
        for number, text in enumerate(texts):
            file.write(b">%d\n%s\n" % (number, text.rstrip(b"\r\n")))
    return path
