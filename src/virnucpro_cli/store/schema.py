"""What is in the file, schema 1: codes, bits, reasons and sizes."""

import errno
from collections.abc import Iterator

SCHEMA = 1
PENDING, DONE, SKIPPED = 0, 1, 2
STATUS_NAMES = ("pending", "done", "skipped")
TRUNCATED, REPLACED, RECOMPUTED, COPIED, WINDOWED, CACHED = 1, 2, 4, 8, 16, 32
FLAG_NAMES = {1: "truncated", 2: "replaced", 4: "recomputed in fp32", 8: "copied", 16: "windowed", 32: "from the cache"}
REASONS = ("", "empty", "invalid residues", "too long", "not finite", "out of memory", "not in what was imported",
           "name not unique")  # fmt: skip
EMPTY, INVALID, TOO_LONG, NOT_FINITE, NO_MEMORY, ABSENT, AMBIGUOUS = 1, 2, 3, 4, 5, 6, 7
AFTER_TRYING = (NOT_FINITE, NO_MEMORY, ABSENT, AMBIGUOUS)
"""Reasons that no policy gives: what came of an attempt."""
UNKNOWN = "unknown"
"""What an imported file says where nothing is known."""
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
REPORT_BYTES = 1 << 16
ENVIRONMENT_BYTES = 1 << 14
MOST_ENVIRONMENTS = 255
NAME_BLOCK = 1 << 16
CHECKSUM_BLOCK, CHECKSUM_BYTES = 1 << 24, 64
LAYOUT_BYTES = 32
ONLY_PLACE = ("attention", "device")
"""Fingerprint keys that change how values round and nothing else: a run may go on elsewhere, and the file says which rows did."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def blocks(n: int, size: int = NAME_BLOCK) -> Iterator[slice]:
    """All of n things in order, `size` of them at a time: as many names, by default, as are held at once."""
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


def whole_lines(text: bytes) -> list[str]:
    """A last line without its end is one that a power cut tore."""
    return text[: text.rfind(b"\n") + 1].decode().splitlines()
