"""Files by path, by URL or by the name of released weights; downloads are cached."""

import contextlib
import difflib
import hashlib
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import timm
import torch
from filelock import FileLock, Timeout
from timm.models import get_pretrained_cfg, is_model
from tqdm import tqdm

from utils.config.errors import ConfigError, UserError, file_errors
from utils.logs.atomic_write import write_atomic
from utils.logs.logger import logger

# Released ImageNet-1K classifiers by short name. `models` registers their URLs in timm.
RELEASED = {"mlla-t": "mlla_tiny", "mlla-s": "mlla_small", "mlla-b": "mlla_base"}

CHUNK_BYTES = 1 << 20
MAX_REASON = 200  # characters of a server's message
TIMEOUT_SECONDS = 30.0  # without an answer from the server
SHA256 = re.compile(r"sha256=([0-9a-f]{8,64})")


class DownloadError(UserError):
    """A file cannot be downloaded, or has another checksum: names the URL, the cause and the remedy."""


def local_file(
    source: str | Path, *, check: Callable[[Path], object] = lambda _: None, is_suspect: bool = False
) -> Path:
    """Return the local file of a path, a URL or a name of released weights, downloading it if it is not cached.

    Args:
        source: a path; a URL (http, https, file), optionally with `#sha256=` and the first 8 or more hexadecimal
            digits of the file's checksum; or a key of `RELEASED`, also as mlla_tiny and the like.
        check: reads a file, and raises a UserError if that is not possible; called before a download gets its name.
        is_suspect: also check a cached file, and download it again if it cannot be read.

    Returns:
        A path, which exists unless `source` was a path that does not.

    Raises:
        DownloadError: the URL cannot be downloaded, the checksum differs, or the file cannot be read.
    """
    name = released_name(str(source))
    if name and not Path(source).is_file():
        return cached(released_url(name), sha256="", check=check, is_suspect=is_suspect, stem=name)
    try:
        parts = urlsplit(str(source))
    except ValueError as error:
        raise DownloadError(f"{source}: not a URL ({error})") from error
    if parts.scheme not in ("http", "https", "file"):
        return Path(source)
    match = SHA256.fullmatch(parts.fragment.lower())
    if parts.fragment and not match:
        raise DownloadError(f"{source}: what follows # must be sha256= and 8 to 64 hexadecimal digits")
    sha256 = match[1] if match else ""
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost"):
            raise DownloadError(f"{source}: a file:// URL of another machine; write file:///path/to/file")
        with file_errors(DownloadError, path, "read"):
            actual = checksum(path) if sha256 and path.is_file() else sha256
        if not actual.startswith(sha256):
            raise DownloadError(f"{path}: its sha256 is {actual}, not {sha256}: another or a damaged file")
        return path
    return cached(parts._replace(fragment="").geturl(), sha256=sha256, check=check, is_suspect=is_suspect)


def released_name(source: str) -> str:
    """Return the short name of released weights, such as mlla-t, for mlla_t, mlla-t or mlla_tiny; "" for others."""
    name = source.lower().replace("_", "-")
    return next((short for short, model in RELEASED.items() if name in (short, model.replace("_", "-"))), "")


def nearest_released_name(source: str) -> str:
    """Return the name of released weights that a source is most like, such as mlla-t for mllat; "" if of none."""
    return next(iter(difflib.get_close_matches(source.lower(), RELEASED, n=1, cutoff=0.8)), "")


def is_timm_model(name: str) -> bool:
    """Return whether timm has a model of this name, and weights with its tag, as in resnet18.a1_in1k."""
    try:
        get_pretrained_cfg(name)
        return bool(is_model(name))
    except RuntimeError:  # an unknown tag
        return False


def nearest_timm_model(name: str) -> str:
    """Return timm's model whose name is most like this one, or an empty string."""
    return next(iter(difflib.get_close_matches(name, timm.list_models(), n=1)), "")


def check_timm_model(key: str, value: str) -> None:
    """Raise ConfigError, with the nearest name, if timm has no model `timm:<name>`, the value of a key."""
    name = value.removeprefix("timm:")
    if not is_timm_model(name):
        near = nearest_timm_model(name)
        hint = f"; did you mean timm:{near}?" if near else "; timm.list_models() lists them"
        raise ConfigError(f"{key} timm:{name}: timm has no such model{hint}", key=key)


def released_url(name: str) -> str:
    """Return the URL of released weights, by a key of `RELEASED`.

    Raises:
        DownloadError: the package `models` was not imported, so timm does not know the URL.
    """
    config = get_pretrained_cfg(RELEASED[name])
    if config is None or not isinstance(config.url, tuple):
        raise DownloadError(f"{name}: import models first, which registers the released weights in timm")
    url, _ = config.url  # with the file name
    return url


def cache_folder() -> Path:
    """Return PyTorch's cache folder, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cache_path(url: str, stem: str = "") -> Path:
    """Return the cache path of a URL, with digits of its hash, since many URLs end in the same name or in none."""
    ending = PurePosixPath(unquote(urlsplit(url).path)).name
    name = PurePosixPath(re.sub(r"[^\w.-]", "_", ending) or "weights.pth")
    digits = hashlib.sha256(url.encode()).hexdigest()[:8]
    # After an underscore, since PyTorch takes digits after a hyphen for the hash of the content.
    return cache_folder() / f"{stem or name.stem[:80]}_{digits}{name.suffix or '.pth'}"


def cached(url: str, *, sha256: str, check: Callable[[Path], object], is_suspect: bool, stem: str = "") -> Path:
    """Return the cached file of a URL. Of several processes on a machine one downloads it, the others wait.

    Raises:
        DownloadError: it cannot be downloaded or stored, its checksum differs, or it cannot be read.
    """
    path = cache_path(url, stem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), url):
            if path.exists() and (reason := fault(path, sha256, check if is_suspect else None)):
                logger.warning("%s: %s; it is deleted and downloaded again", path, reason)
                path.unlink()
            if not path.exists():
                for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a process that was killed
                    leftover.unlink()
                download(url, path, sha256=sha256, check=check)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DownloadError(f"{url}: cannot be stored as {path} ({reason}); make room, or set TORCH_HOME") from error
    return path


def fault(path: Path, sha256: str, check: Callable[[Path], object] | None) -> str:
    """Return what is wrong with a downloaded file: another checksum, or that it cannot be read; "" if nothing is."""
    if sha256 and not (actual := checksum(path)).startswith(sha256):
        return f"its sha256 is {actual}, not {sha256}"
    try:
        if check is not None:
            check(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


@contextlib.contextmanager
def locked(path: Path, url: str) -> Iterator[None]:
    """Hold a lock on a file; a process that dies loses it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process to download %s", url)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(url: str, path: Path, *, sha256: str = "", check: Callable[[Path], object] = lambda _: None) -> None:
    """Download a URL to a file, which is there whole and readable, or not at all.

    Raises:
        DownloadError: no answer, a web page in place of a file, fewer bytes than the server announced, another
            checksum, or a file that cannot be read.
        OSError: the file cannot be written.
    """
    remedy = "; or download it by other means and name the file"
    logger.info("downloading %s to %s", url, path)
    request = urllib.request.Request(url, headers={"User-Agent": "mlla"})

    def write(temporary: Path) -> None:
        receive(answer, temporary, title=path.name)
        if reason := fault(temporary, sha256, check):
            raise DownloadError(
                f"{url}: the server sent a file of {temporary.stat().st_size:,} bytes: {reason}{remedy}"
            )

    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise DownloadError(f"{url}: leads to a web page, not to a file{remedy}")
            if answer.status not in (200, None):  # None: of a protocol without
                raise DownloadError(f"{url}: the server says {answer.status} {answer.reason}, not 200 OK{remedy}")
            write_atomic(path, write)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: the server says {error.code} {one_line(error.reason)}{remedy}") from error
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = one_line(getattr(error, "reason", error)) or type(error).__name__
        raise DownloadError(f"{url}: download failed ({reason}); try again{remedy}") from error


def one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:MAX_REASON]


def receive(answer: HTTPResponse, path: Path, *, title: str) -> None:
    """Write a server's answer to a file, with a progress bar on a terminal."""
    length = answer.headers.get("Content-Length", "")
    announced = int(length) if length.isdecimal() else 0
    bar = tqdm(total=announced or None, desc=title, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    with bar, path.open("wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
        received = file.tell()
    if announced and received != announced:  # http.client does not notice a connection that closes early
        raise ConnectionError(f"{received:,} of {announced:,} bytes received")


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
