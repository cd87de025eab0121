"""DNABERT-S and VirNucPro's two heads into the cache: all that it needs beside ESM-2."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from virnucpro_cli.errors import UserError, joined
from virnucpro_cli.model import locate
from virnucpro_cli.model.families import PUBLISHED_SHA256, by_name, family_of
from virnucpro_cli.predict import head as heads
from virnucpro_cli.predict.head import PUBLISHED, Head
from virnucpro_cli.store import disk

NAME = "virnucpro"
"""The name of all of it for `virnucpro fetch`."""
NUCLEOTIDE_MODEL = "dnabert-s"
REVISION = "0b7e6f1f1c5972ce30aa1ced5977890406d3efe2"
URL = "https://raw.githubusercontent.com/Li-Jing-1997/VirNucPro/{revision}/{chunk}_model.pth"
LICENCE = "MIT"
SECONDS, MOST_BYTES = 60, 1 << 25
Say = Callable[[str], None]


def url_of(chunk: int) -> str:
    """Where a published head is."""
    return URL.format(revision=REVISION, chunk=chunk)


def fetched(chunk: int, say: Say) -> Head:
    """The published head of a chunk length, out of the cache or else downloaded into it.

    Raises UserError if it cannot be had, with the file to bring.
    """
    if (there := heads.kept(chunk)) is not None:
        return there
    try:
        heads.folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refusal = f"The cache {heads.folder()} cannot be written: {error.strerror}."
        raise UserError(refusal, "Set XDG_CACHE_HOME to a folder that can be written.") from None
    waiting = f"another run is fetching the {chunk} head: waiting for it"
    with disk.alone(heads.folder() / f"{chunk}.lock", say, waiting):
        return heads.kept(chunk) or _downloaded(chunk, say)


def _downloaded(chunk: int, say: Say) -> Head:
    """Have the head in the cache. Raises UserError."""
    safetensors, file = heads.places(chunk)
    say(f"fetching VirNucPro's {chunk} head from {url_of(chunk)}; licence: {LICENCE}")
    try:
        data = _bytes_at(url_of(chunk))
    except (OSError, ValueError) as error:
        refusal = f"VirNucPro's {chunk} head is not on this machine and could not be fetched.\n  tried      {error}"
        raise UserError(refusal, to_bring(chunk)) from None
    with disk.written_whole(file) as to:
        to.write(data)
    try:
        found = heads.kept(chunk)
    finally:
        file.unlink()
    assert found is not None
    heads.save(found, safetensors)
    return found


def _bytes_at(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        data: bytes = answer.read(MOST_BYTES)
    return data


def to_bring(chunk: int) -> str:
    """The file of a head, and where to put it, for a machine without internet access."""
    *_, file = heads.places(chunk)
    return f"Put {url_of(chunk)} (git blob {PUBLISHED[chunk]}) at {file}."


def fetch_all(say: Say) -> None:
    """Have DNABERT-S and both heads in the cache, and say where. Raises UserError with all that is still missing."""
    missing: list[UserError] = []
    try:
        weights = locate.verified(locate.fetch(NUCLEOTIDE_MODEL, say))
        say(f"{weights.name}: {weights.place}\nSHA-256 {weights.sha256}")
    except UserError as error:
        missing.append(UserError(error.what, "\n".join([error.remedy, *_files_to_bring()])))
    for chunk in PUBLISHED:
        try:
            head = fetched(chunk, say)
            say(f"{head.name}\ngit blob {head.git_blob}")
        except UserError as error:
            missing.append(error)
    if missing:
        raise joined(missing)
    if locate.locate("3B") is None:
        say("ESM-2 3B is not on this machine; predict fetches it, or ahead of time: virnucpro fetch 3B")


def _files_to_bring() -> Iterator[str]:
    """The files of DNABERT-S, with their checksums and the place of each."""
    spec = by_name(NUCLEOTIDE_MODEL)
    assert spec is not None
    place, tokenizer = locate.places(spec)[0], family_of(spec).TOKENIZER
    place = place / "main" if place.name == "snapshots" else place
    pins = PUBLISHED_SHA256[spec.name] | (dict([tokenizer]) if tokenizer else {})
    for name, sha256 in pins.items():
        yield f"Put {name} (SHA-256 {sha256}) at {place / name}."
    yield f"Put config.json at {place / 'config.json'}."
