"""URLs, the cache, checksums, and transfers that go wrong; the server is on this machine."""

import gzip
import hashlib
import http.server
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import models  # noqa: F401, registers the released weights in timm
from tests.faults.processes import Started, start_process
from tests.helpers import ROOT
from utils.checkpoint.download import (
    RELEASED,
    DownloadError,
    cache_path,
    checksum,
    download,
    local_file,
    released_url,
)
from utils.checkpoint.weights import read_weights
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT and the files of `folder`, with the fault that the path names, and records the requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name = self.path.strip("/").split("?")[0]
        if name == "missing":
            self.send_error(404, "Not Found")
            return
        if name == "garbage":
            self.wfile.write(b"hello\n\nworld\n")
            return
        if name.isdecimal():  # a status
            self.send_response(int(name))
            self.send_header("Location", self.path)
            self.end_headers()
            return
        stored = self.server.folder / name
        content = stored.read_bytes() if name and stored.is_file() else CONTENT
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if name == "login" else "application/octet-stream")
        if "unannounced" not in name:
            self.send_header("Content-Length", "abc" if name == "odd-length" else str(len(content)))
        self.end_headers()
        if "short" in name:
            content = content[: len(content) // 2]
        pieces = 20 if name == "slow" else 1
        size = len(content) // pieces
        for i in range(pieces):
            self.wfile.write(content[i * size : (i + 1) * size])
            self.wfile.flush()
            time.sleep(0.1 if pieces > 1 else 0)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def cached_files(folder: Path) -> list[str]:
    files = (folder / "home" / "hub" / "checkpoints").iterdir()
    return sorted(path.name for path in files if path.suffix != ".lock")


def test_a_url_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = local_file(f"{server.url}/w.safetensors")
    assert path.read_bytes() == CONTENT
    assert re.fullmatch(r"w_[0-9a-f]{8}\.safetensors", path.name)
    assert path.parent == tmp_path / "home" / "hub" / "checkpoints"
    assert local_file(f"{server.url}/w.safetensors#sha256={SHA256}") == path
    assert local_file(f"{server.url}/w.safetensors#sha256={SHA256[:8].upper()}") == path
    assert len(server.requests) == 1
    assert local_file(f"{server.url}/other/w.safetensors") != path  # another file of the same name
    assert local_file(f"{server.url}/unannounced").read_bytes() == CONTENT


def test_a_file_with_another_checksum_is_not_kept(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DownloadError, match=rf"5,120,000 bytes: its sha256 is {SHA256}, not {'0' * 64}; or"):
            local_file(f"{server.url}/w.pth#sha256={'0' * 64}")
        assert cached_files(tmp_path) == []
    damaged = local_file(f"{server.url}/w.pth")
    damaged.write_bytes(b"damaged")
    assert local_file(f"{server.url}/w.pth#sha256={SHA256[:10]}").read_bytes() == CONTENT


@pytest.mark.parametrize("fragment", ["sha256=123", "sha256=xyz", "md5=12345678", f"sha256={'0' * 65}"])
def test_malformed_checksums_are_refused(server: Server, fragment: str) -> None:
    with pytest.raises(DownloadError, match="must be sha256= and 8 to 64 hexadecimal digits"):
        local_file(f"{server.url}/w.pth#{fragment}")
    assert not server.requests


def test_server_errors(server: Server, tmp_path: Path) -> None:
    for name, message in {
        "missing": "the server says 404 Not Found; or download it by other means and name the file",
        "login": "leads to a web page, not to a file",
        "short": r"download failed \(2,560,000 of 5,120,000 bytes received\); try again",
        "204": "the server says 204 No Content, not 200 OK",
        "206": "the server says 206 Partial Content, not 200 OK",
        "302": "the server says 302 The HTTP server returned a redirect error",
        "garbage": r"download failed \(hello\); try again",
    }.items():
        with pytest.raises(DownloadError, match=message) as caught:
            local_file(f"{server.url}/{name}")
        assert f"{server.url}/{name}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert cached_files(tmp_path) == []
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="download failed"):
        local_file(f"{server.url}/w.pth")


def test_a_full_disk_leaves_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DownloadError, match=r"cannot be stored as .* \(No space left on device\)"):
        local_file(f"{server.url}/w.pth")
    assert cached_files(tmp_path) == []


FETCH = "import sys; from utils.checkpoint.download import local_file; print(local_file(sys.argv[1]))"


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Started, Path]]:
    """Return a function that starts a download in a process, which prints the path: (process, file of its output)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(url: str) -> tuple[Started, Path]:
        output = tmp_path / f"printed_{len(list(tmp_path.glob('printed_*')))}"
        output.touch()
        return start_process(["-c", FETCH, url], output=output, error=tmp_path / "errors", forked=True), output

    return start


@pytest.mark.slow
def test_a_killed_download_leaves_no_partial_file_and_no_lock(
    server: Server, tmp_path: Path, fetch: Callable[[str], tuple[Started, Path]]
) -> None:
    """Two processes need a file: the one that downloads it is killed, and the other downloads it, once."""
    first, _ = fetch(f"{server.url}/slow")
    while not server.requests:
        time.sleep(0.02)
    second, printed = fetch(f"{server.url}/slow")
    time.sleep(0.5)
    first.kill()
    first.wait()
    assert not [name for name in cached_files(tmp_path) if not name.endswith(".tmp")]
    assert second.wait(120) == 0
    path = Path(printed.read_text().strip())
    assert path.read_bytes() == CONTENT
    assert cached_files(tmp_path) == [path.name]
    assert server.requests == ["/slow", "/slow"]


@pytest.mark.slow
def test_of_several_processes_one_downloads(server: Server, fetch: Callable[[str], tuple[Started, Path]]) -> None:
    started = [fetch(f"{server.url}/slow") for _ in range(2)]
    assert [process.wait(120) for process, _ in started] == [0, 0]
    (path,) = {printed.read_text().strip() for _, printed in started}
    assert Path(path).read_bytes() == CONTENT
    assert server.requests == ["/slow"]


def test_file_urls(tmp_path: Path) -> None:
    path = tmp_path / "my weights.pth"
    path.write_bytes(CONTENT)
    url = path.as_uri()
    assert "%20" in url
    assert local_file(url) == path
    assert local_file(f"{url}#sha256={SHA256[:16]}") == path
    with pytest.raises(DownloadError, match=f"its sha256 is {SHA256}, not 1234567890"):
        local_file(f"{url}#sha256=1234567890")
    assert path.exists()  # it is the user's own
    with pytest.raises(DownloadError, match="of another machine"):
        local_file("file://server/weights.pth")


def test_names_of_released_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fetched = []

    def pretend(url: str, path: Path, **_: Any) -> None:
        fetched.append(url)
        path.write_bytes(b"weights")

    monkeypatch.setattr("utils.checkpoint.download.download", pretend)
    paths = {name: local_file(name) for name in ("mlla-t", "mlla_t", "mlla_tiny", "MLLA-T", "mlla-s", "mlla_base")}
    assert fetched == [released_url(name) for name in ("mlla-t", "mlla-s", "mlla-b")]
    assert len(set(paths.values())) == 3
    assert re.fullmatch(r"mlla-b_[0-9a-f]{8}\.pth", paths["mlla_base"].name)
    assert local_file(released_url("mlla-t")).name != local_file(released_url("mlla-s")).name  # both end in /?dl=1
    Path("mlla-t").write_bytes(b"my own")
    assert local_file("mlla-t") == Path("mlla-t")
    assert local_file("some/file.pth") == Path("some/file.pth")


def test_readme_has_the_same_links() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(released_url(name) in text for name in RELEASED)


def test_weights_over_the_network(server: Server) -> None:
    for name in ("w.pth", "odd-length"):
        torch.save({"model": {"a": torch.tensor(1.0)}}, server.folder / name)
        assert read_weights(f"{server.url}/{name}").model == {"a": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("w.pth", b"", "0 bytes: cannot be read as a PyTorch weights file: damaged, or not its format"),
        ("w.pth", b"<html><body>", "12 bytes: is a web page"),
        ("w.pth", gzip.compress(b"weights", mtime=0), "cannot be read as a PyTorch weights file"),
        ("unannounced-short", None, "is damaged: its list of records"),
    ],
)
def test_a_download_that_cannot_be_read_is_not_kept(
    server: Server, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is None:
        torch.save({"model": {"a": torch.zeros(999)}}, server.folder / name)
    else:
        (server.folder / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"the server sent a file of .*{reason}.*or download it by other means"):
            load_checkpoint(f"{server.url}/{name}")
        assert cached_files(tmp_path) == []
    assert len(server.requests) == 2


def test_a_damaged_file_in_the_cache_is_downloaded_again(server: Server) -> None:
    torch.save({"model": {"a": torch.arange(999.0)}}, server.folder / "w.pth")
    path = local_file(f"{server.url}/w.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert load_checkpoint(f"{server.url}/w.pth")["model"]["a"].equal(torch.arange(999.0))
    assert path.read_bytes() == (server.folder / "w.pth").read_bytes()
    assert len(server.requests) == 2
    torch.save({"model": {"a": torch.zeros(1)}, "hooks": os.path.exists}, server.folder / "v.pth")
    local_file(f"{server.url}/v.pth")
    for _ in range(2):  # refused, which another download would not change, and so not kept
        with pytest.raises(CheckpointError, match="such objects could run code"):
            load_checkpoint(cache_path(f"{server.url}/v.pth"))
    assert len(server.requests) == 3


def test_progress_bar_counts_bytes(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None: ...

    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        download(f"{server.url}/w.pth", tmp_path / "w.pth")
    assert checksum(tmp_path / "w.pth") == SHA256
    assert "100%" in terminal.text
    assert "5.12M/5.12M" in terminal.text
    download(f"{server.url}/w.pth", tmp_path / "v.pth")
    assert capfd.readouterr().err == ""


def test_released_weights_need_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.checkpoint.download.get_pretrained_cfg", lambda _: None)
    with pytest.raises(DownloadError, match="mlla-t: import models first"):
        local_file("mlla_tiny")
