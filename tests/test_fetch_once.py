"""Tasks of an array that start at once on an empty cache: one of them downloads, all have the same verified file, nothing is left."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from multiprocessing.synchronize import Barrier
from pathlib import Path

import huggingface_hub.constants
import pytest

from children import CHILDREN
from conftest import TINY, write_model
from test_weights import FakeHub, Hub, fair_esm_pt, point_hub_at
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import families, locate, weights
from virnucpro_cli.model.spec import ModelSpec

TASKS = 16
MARKS = (".said", ".fetching", ".waiting", ".lock")
SPEC = ModelSpec("esm2_tiny", TINY.layers, TINY.hidden, TINY.heads)


class Slow(Hub):
    """A hub that stops halfway in every file of weights until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.halfway, self.go_on = threading.Event(), threading.Event()

    def downloads(self) -> int:
        return sum(line.startswith("GET") and line.endswith((".safetensors", ".pt")) for line in self.requests)


class SlowHub(FakeHub):
    def __init__(self, hub: Slow, *args: object):
        self.hub = hub
        super().__init__(hub.files, hub.published, hub.requests, *args)

    def send(self, body: bytes, status: int = 200) -> None:
        if self.command != "GET" or not self.path.endswith((".safetensors", ".pt")) or status != 200:
            super().send(body, status)
            return
        write, half = self.wfile.write, len(body) // 2

        def in_two(data: bytes) -> int:
            write(data[:half])
            self.hub.halfway.set()
            self.hub.go_on.wait(600)
            with suppress(OSError):  # it may have been killed
                write(data[half:])
            return len(data)

        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        in_two(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Slow]:
    hub = Slow()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: partial(SlowHub, hub)(*args))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def task(number: int, home: Path, url: str, together: Barrier) -> None:
    """One task: what it fetched, or why not, into a file of its own; other files say that it is the one that downloads, or that it waits."""
    os.environ |= {"XDG_CACHE_HOME": str(home / "xdg"), "TORCH_HOME": str(home / "torch")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setitem(families.SIZES, SPEC.name, SPEC)
        point_hub_at(patch, url)
        together.wait()
        try:
            found = locate.verified(
                locate.fetch(
                    SPEC.name,
                    lambda text: (home / f"{os.getpid()}.{'waiting' if 'waiting' in text else 'fetching'}").touch(),
                )
            )
            said = {"sha256": found.sha256, "place": found.place}
        except UserError as error:
            said = {"error": str(error)}
        (home / f"{number}.said").write_text(json.dumps(said))


def start(hub: Slow, home: Path) -> list[object]:
    together = CHILDREN.Barrier(TASKS)
    url = hub.url  # type: ignore[attr-defined]
    processes = [CHILDREN.Process(target=task, args=(i, home, url, together)) for i in range(TASKS)]
    for process in processes:
        process.start()
    assert hub.halfway.wait(300)
    deadline = time.monotonic() + 300
    while len(list(home.glob("*.waiting"))) < TASKS - 1:
        assert time.monotonic() < deadline, "not all others wait for the one that downloads"
        time.sleep(0.01)
    return processes


def check(hub: Slow, home: Path, processes: list, expected: str, killed: int = 0) -> None:
    for process in processes:
        process.join(300)
    said = [json.loads(file.read_text()) for file in home.glob("*.said")]
    assert len(said) == TASKS - killed
    assert {each.get("sha256", each.get("error")) for each in said} == {expected}
    assert len({each["place"] for each in said}) == 1
    assert hub.downloads() == 1 + killed
    left = [file for file in home.rglob("*") if file.is_file() and file.suffix not in MARKS]
    heavy = [file for file in left if not file.is_symlink() and file.stat().st_size > 10_000]
    assert len(heavy) == 1, left
    assert not [file for file in left if "incomplete" in file.name or "partial" in file.name], left


@pytest.mark.parametrize(("server", "killed"), [("huggingface", 0), ("huggingface", 1), ("fair-esm", 1)])
def test_sixteen_tasks_fetch_once(server: str, killed: int, hub: Slow, tmp_path: Path) -> None:
    if server == "huggingface":
        folder = write_model(tmp_path / "published")
        hub.publish(folder)
        expected = hub.published["model.safetensors"]
    else:
        hub.files = {"esm2_tiny.pt": fair_esm_pt(tmp_path / "tiny.pt", weights.random_state(TINY)).read_bytes()}
        expected = hashlib.sha256(hub.files["esm2_tiny.pt"]).hexdigest()
    home = tmp_path / "home"
    home.mkdir()
    processes = start(hub, home)
    (fetching,) = home.glob("*.fetching")
    if killed:
        os.kill(int(fetching.stem), signal.SIGKILL)
    hub.go_on.set()
    check(hub, home, processes, expected, killed)
