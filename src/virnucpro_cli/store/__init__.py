"""The output file: laid out in full by HDF5, closed, and from then on filled by `pwrite` at the datasets' offsets.

HDF5 never writes to the file again, so a kill at any moment leaves it readable. A row whose status is `done` is on
disk: rows are synced before the status bytes that vouch for them. The file is `OUT.partial` until it is complete.
"""

from virnucpro_cli.store.disk import (
    check_destination,
    check_free_space,
    checksum,
    discard_partial,
    free_space,
    partial_path,
    take_back,
)
from virnucpro_cli.store.filling import Store
from virnucpro_cli.store.layout import Layout
from virnucpro_cli.store.reading import EmbeddingFile, differences, fingerprint_of, read_embeddings
from virnucpro_cli.store.schema import (
    AFTER_TRYING,
    CACHED,
    COPIED,
    DONE,
    EMPTY,
    ENVIRONMENT_BYTES,
    FLAG_NAMES,
    INVALID,
    NAME_BLOCK,
    NO_MEMORY,
    NOT_FINITE,
    ONLY_PLACE,
    PENDING,
    REASONS,
    RECOMPUTED,
    REPLACED,
    REPORT_BYTES,
    SCHEMA,
    SKIPPED,
    STATUS_NAMES,
    TOO_LONG,
    TRUNCATED,
    WINDOWED,
)
