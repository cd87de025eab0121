"""Plain FASTA files beside those that are embedded: written, and read for the messages of the index."""

import os
from collections.abc import Sequence
from pathlib import Path

from virnucpro_cli import scratch
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta.indexing import index
from virnucpro_cli.fasta.reading import open_sources


def write_texts(path: Path, texts: list[bytes]) -> Path:
    """A FASTA of sequence texts as they stand, named by their numbers."""
    with open(path, "wb") as file:
        for number, text in enumerate(texts):
            file.write(b">%d\n%s\n" % (number, text.rstrip(b"\r\n")))
    return path


def refuse_unreadable(paths: Sequence[str]) -> None:
    """Read FASTA files once by the rules of the index, for its error messages. Raises UserError; pipes are refused."""
    for path in paths:
        if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
            raise UserError(f"{path} can be read only once, and here it is read again.", "Save it to a file first.")
    with scratch.folder() as folder:
        index(open_sources(paths, Path(folder)), dedup=False)
