"""The output file: laid out in full by HDF5, closed, and from then on filled by `pwrite` at the datasets' offsets.

HDF5 never writes to the file again, so a kill at any moment leaves it readable. A row whose status is `done` is on
disk: rows are synced before the status bytes that vouch for them. The file is `OUT.partial` until it is complete.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from virnucpro_cli.store.disk import (
    Overtaken,
    allow_open_files,
    behind,
    check_destination,
    check_free_space,
    check_hdf5_name,
    check_new,
    check_unheld,
    checksum,
    copy_back,
    discard_partial,
    free_space,
    has_room,
    lock_of,
    new_file,
    partial_path,
    without_lock,
)
from virnucpro_cli.store.layout import Extra, Layout, Names, of_this_command
from virnucpro_cli.store.schema import (
    ABSENT,
    AFTER_TRYING,
    AMBIGUOUS,
    CACHED,
    COPIED,
    DONE,
    EMPTY,
    ENVIRONMENT_BYTES,
    FLAG_NAMES,
    HALVES,
    HDF5_MAGIC,
    INVALID,
    NAME_BLOCK,
    NO_MEMORY,
    NOT_FINITE,
    PENDING,
    REASONS,
    RECOMPUTED,
    REPLACED,
    REPORT_BYTES,
    SKIPPED,
    STATUS_NAMES,
    TOO_LONG,
    TRUNCATED,
    UNKNOWN,
    WINDOWED,
    blocks,
    differences,
)
from virnucpro_cli.store.writer import Store

if TYPE_CHECKING:
    from virnucpro_cli.store.checked import fingerprint_of, opened_hdf5
    from virnucpro_cli.store.reader import (
        EmbeddingFile,
        fingerprint_tried,
        opened,
        opened_all,
        read_embeddings,
        unfinished,
    )

_READ_BY = dict.fromkeys(("fingerprint_of", "opened_hdf5"), "checked") | dict.fromkeys(
    ("EmbeddingFile", "fingerprint_tried", "opened", "opened_all", "read_embeddings", "unfinished"), "reader"
)


def __getattr__(name: str) -> Any:
    """Import on first use what reads files: a run that begins a file reads none."""
    if name in _READ_BY:
        return getattr(import_module(f"{__name__}.{_READ_BY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_READ_BY]
