"""Temporary folders, and one message where none can be made or filled."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from virnucpro_cli.errors import UserError

REMEDY = "Make room there, or set TMPDIR to a folder that can be written."


@contextmanager
def folder() -> Iterator[str]:
    """A folder that is gone at the end. Raises UserError if it cannot be made, or if no space is left."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="virnucpro-")
    except OSError as error:
        raise UserError(f"No temporary folder can be made: {error}.", REMEDY) from None
    try:
        with temporary as path:
            yield path
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"No space is left for temporary files in {temporary.name}.", REMEDY) from None
