"""The file as data, schema 1: codes and reasons; every dataset, attribute and setting with its type and bounds."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.config.options import fields_of
from virnucpro_cli.kinds import EMITS, KINDS, NUCLEOTIDE, POOLED

SCHEMA = 1
PENDING, DONE, SKIPPED = 0, 1, 2
STATUS_NAMES = ("pending", "done", "skipped")
TRUNCATED, REPLACED, RECOMPUTED, COPIED, WINDOWED, CACHED = 1, 2, 4, 8, 16, 32
STATES = ("status", "flags", "reason", "computed_by")
"""Columns that say what became of a record."""
HALVES = ("dna",)
"""Folders of rows that another model has of the same records, with states and sums of their own."""
FLAG_NAMES = {1: "truncated", 2: "replaced", 4: "recomputed in fp32", 8: "copied", 16: "windowed", 32: "from the cache"}
REASONS = ("", "empty", "invalid residues", "too long", "not finite", "out of memory", "not in what was imported",
           "name not unique")  # fmt: skip
EMPTY, INVALID, TOO_LONG, NOT_FINITE, NO_MEMORY, ABSENT, AMBIGUOUS = 1, 2, 3, 4, 5, 6, 7
AFTER_TRYING = (NOT_FINITE, NO_MEMORY, ABSENT, AMBIGUOUS)
"""Reasons that an attempt has, and no policy gives."""
UNKNOWN = "unknown"
"""The word of an imported file where nothing is known."""
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
REPORT_BYTES = 1 << 16
ENVIRONMENT_BYTES = 1 << 14
MOST_ENVIRONMENTS = 255
NAME_BLOCK = 1 << 16
CHECKSUM_BYTES = 64
LAYOUT_BYTES = 32
ONLY_PLACE = ("attention", "device")
"""Fingerprint keys that change how values round and nothing else: a run may go on elsewhere, and the file says so."""


def chunks(offsets: NDArray[np.int64], n: int, rows: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of n records that have the rows offsets[i]:offsets[i + 1] each (int64 [n + 1]).

    A range has at most `rows` records and rows together, and at least one record.
    """
    start = 0
    while start < n:
        upto = int(np.searchsorted(offsets, offsets[start] + rows, side="right")) - 1
        stop = min(n, start + rows, max(start + 1, upto))
        yield start, stop
        start = stop


def blocks(n: int, size: int = NAME_BLOCK) -> Iterator[slice]:
    """All of n things in order, `size` of them at a time: as many names, by default, as are held at once."""
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


def hashes(n: int, texts: Callable[[int, int], Iterable[str]]) -> NDArray[np.int64]:
    """A hash of each of n texts, int64 [n]. texts(start, stop): those of a range, a block at a time."""
    every = (hash(text) for rows in blocks(n) for text in texts(rows.start, rows.stop))
    return np.fromiter(every, np.int64, n)


def distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The values (int64 [n]) without repetitions, rising. NumPy's own `unique` takes fifty times as long on many."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def whole_lines(text: bytes) -> list[str]:
    """A last line without its end is one that a power cut tore."""
    return text[: text.rfind(b"\n") + 1].decode().splitlines()


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Differences between two fingerprints in words, but for ONLY_PLACE."""
    keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    words = {
        "contigs_sha256": "the content of the contigs differs",
        "input_sha256": "the content of the input differs",
        "weights_sha256": "the model's weights differ",
    }
    here = {key: f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in keys if key not in ONLY_PLACE}
    return [words.get(key, text) for key, text in here.items()]


# --- datasets --------------------------------------------------------------------------------------------------------

TEXT, BYTES = "text", "bytes"
REAL, WHOLE = ("<f2", "<f4"), ("|i1", "<i2", "<i4", "<i8")
LAYER = r"-?\d{1,4}"
MOST_OBJECTS = 1 << 14
"""Datasets and groups of a file, at most; attributes too."""


class Field(NamedTuple):
    """A dataset. name: a pattern; dtypes: those it may have; shape: letters are sizes that several datasets share.

    N: records; R: residues; T: tokens of the alphabet; D, E: dimensions; G: groups; C: contigs; V: values of maps.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[str | int, ...]


FIELDS = (
    Field("sequence_ids", (TEXT,), ("N",)),
    Field("lengths|replaced", ("<i4",), ("N",)),
    Field("flags", ("<u2",), ("N",)),
    Field("status|reason|computed_by", ("|u1",), ("N",)),
    Field("records", ("<i8",), ("N",)),
    Field("residue/offsets", ("<i8",), ("N+1",)),
    Field(f"({'|'.join(POOLED)})/{LAYER}", REAL, ("N", "D")),
    Field(f"residue/{LAYER}", REAL, ("R", "D")),
    Field("unmasked/logits", REAL, ("R", "T")),
    Field("unmasked/(entropy|pseudo_perplexity)", ("<f4",), ("N",)),
    Field("contacts/values", REAL, ("V",)),
    Field("contacts/starts", ("<i8",), ("N",)),
    Field("contacts/sizes", ("<i4",), ("N",)),
    Field("contacts/status", ("|u1",), ("N",)),
    Field("genes/(contig|begin|end|strand)", WHOLE, ("N",)),
    Field("gaps|tokens", ("<i4",), ("N",)),
    Field("contigs/ids", (TEXT,), ("C",)),
    Field("contigs/lengths", WHOLE, ("C",)),
    Field("groups/of", ("<i8",), ("N",)),
    Field("groups/ids", (TEXT,), ("G",)),
    Field("groups/members", ("<i8",), ("G",)),
    Field(f"groups/(mean|length_weighted_mean|max)/{LAYER}", REAL, ("G", "D")),
    Field("dna/flags", ("<u2",), ("N",)),
    Field("dna/(status|reason|computed_by)", ("|u1",), ("N",)),
    Field(f"dna/({'|'.join(POOLED)})/{LAYER}", REAL, ("N", "E")),
    Field(f"dna/groups/(mean|length_weighted_mean|max)/{LAYER}", REAL, ("G", "E")),
    Field("run/(report|environments|checksum|layout)", (BYTES,), ()),
    Field("(run|contacts|dna)/sums", ("<u8",), ("N",)),
    Field("run/complete", ("|u1",), ()),
)
NEEDED = ("sequence_ids", "lengths", "replaced", "flags", "status", "reason", "computed_by", "run/report",
          "run/environments", "run/checksum", "run/complete")  # fmt: skip
"""Datasets of every file."""


def is_of_rows(name: str) -> bool:
    """Whether a dataset holds rows that run/sums vouches for: rows of records or residues, and scores."""
    return name.split("/")[0] in (*POOLED, "residue", "unmasked") and name != "residue/offsets"


def name_in(half: str, name: str) -> str:
    """The dataset of the file that a half has for one of its own names; of no half, the name itself."""
    if not half or (name.startswith("run/") and name != "run/sums"):
        return name
    return f"{half}/{name.removeprefix('run/')}"


def field_of(name: str) -> Field | None:
    """The row of FIELDS for a dataset; None for one that others added."""
    return next((field for field in FIELDS if re.fullmatch(field.name, name)), None)


# --- attributes and settings -----------------------------------------------------------------------------------------

MOST_TEXT, MOST_WORD = 1 << 24, 1 << 16
"""Letters of an attribute, and of a text that is a name or an entry of a list, at most."""
MOST_LAYERS = 1000
COMPUTED_IN = ("float32", "float16", "bfloat16", "float8_e4m3fn", UNKNOWN)
WORDS = ("model", "device", "attention", "tool_version", "created", "weights", "weights_sha256", "dtype")
"""Attributes of every file that are text."""


class Whole(NamedTuple):
    """A whole number within bounds."""

    least: int
    most: int


class Distinct(NamedTuple):
    """A list of different things of a form, at least one."""

    form: Any


Form = Any
"""Form of a value in JSON: a type, a Whole, a set of words, [form of each], Distinct, {key: form}; key? may lack."""

_SOURCE = {"path": str, "bytes": Whole(0, 1 << 62), "sha256": str}


def _choices(name: str) -> set[str]:
    return set(fields_of(EmbedConfig)[name].choices)


FINGERPRINT: dict[str, Form] = {
    "input_sha256": [str], "weights_sha256": str, "layers": Distinct(Whole(-1, 9999)), "pool": Distinct(set(KINDS)),
    "dtype": set(COMPUTED_IN), "store_dtype": _choices("store_dtype"), "max_residues": Whole(1, 1 << 31),
    "long": _choices("long") - {"auto"}, "invalid": _choices("invalid"), "id": _choices("id"), "dedup": bool,
    "attention": str, "device": str, "overlap?": Whole(0, 1 << 31), "gaps?": _choices("gaps"),
    "emit?": Distinct(set(EMITS)), "shard?": str, "groups?": str, "imported?": str, "unknown?": [str],
    "kind?": {NUCLEOTIDE}, "gene_caller?": {"name": _choices("genes"), "version": str},
    **{f"{half}?": {"weights_sha256": str, "layers": Distinct(Whole(-1, 9999)), "pool": Distinct(set(KINDS))}
       for half in HALVES},
}  # fmt: skip
PLAIN: Form = (
    dict.fromkeys(WORDS, str)
    | {"base_sha256?": str, "family?": str, "kind?": str}
    | dict.fromkeys(("approximate?", "model_layers?"), int | np.integer | np.bool_)
)
"""Attributes that are text, and numbers or yes and no."""
JSONS: dict[str, Form] = {
    "fingerprint": FINGERPRINT, "config": {"model": str}, "environment": {"torch?": str}, "argv": [str],
    "layers": Distinct(Whole(-1, 9999)), "pool": Distinct(set(KINDS)), "inputs": [_SOURCE],
    "contigs?": [_SOURCE], "columns?": [str], "tables?": [str], "merged_from?": [str],
    "adapters?": [{"path": str, "sha256": str}],
}  # fmt: skip
"""Attributes in JSON."""


def unfit(value: Any, form: Form, whole: bool = True) -> str | None:
    """The place in a value that is not of the form, such as `pool`; empty for the value itself, None if all of it fits.

    whole: whether a key that lacks does not fit.
    """
    if isinstance(form, dict | list):
        if not isinstance(value, type(form)):
            return ""
        if isinstance(form, list):
            parts = ((str(i), each, form[0]) for i, each in enumerate(value))
        elif whole and (lacking := [key for key in form if key[-1] != "?" and key not in value]):
            return lacking[0]
        else:
            keys = [(key.removesuffix("?"), each) for key, each in form.items()]
            parts = ((key, value[key], each) for key, each in keys if key in value)
        places = ((name, unfit(each, its, whole)) for name, each, its in parts)
        return next((f"{name}.{place}".rstrip(".") for name, place in places if place is not None), None)
    if isinstance(form, Distinct):
        fits = isinstance(value, list) and 0 < len(value) <= MOST_LAYERS and unfit(value, [form.form]) is None
        fits = fits and len(set(value)) == len(value)
    elif isinstance(form, Whole):
        fits = isinstance(value, int) and not isinstance(value, bool) and form.least <= value <= form.most
    elif isinstance(form, set):
        fits = isinstance(value, str) and value in form
    else:
        fits = isinstance(value, form) and (not isinstance(value, str) or len(value) <= MOST_WORD)
    return None if fits else ""
