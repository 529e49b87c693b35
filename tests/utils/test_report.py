"""utils.report: content of the page, no external resources, and how a browser shows it."""

import base64
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from config import SCHEMA
from tests.helpers import exit_code
from tests.utils.test_compare import make_run
from utils import report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=http://example.com/x.png onerror=alert(1)>&\"'"
VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """Elements and texts of a page; checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted once, with texts that would be markup if they were not escaped."""
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "model" / "a<b>&",
        [10.0, 95.5, 95.25],
        ema_acc1=[1.0, 2.0, 3.0],
        train_loss=[3.0, 2.0, 1.0],
        train_mesa=[0.5, 0.25, 0.125],
        settings=f"SEED: 7\nAMP: false\nDATA: {{DATA_PATH: {json.dumps(EVIL)}}}\n",
    )
    starts = [{"epoch": epoch, "host": EVIL, "started": "now", "packages": {"torch": "9.9"}} for epoch in (0, 2)]
    (folder / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "log_rank0.txt").write_text(
        f"2026-01-01 00:00:00,000 WARNING {EVIL}\n2026-01-01 00:00:01,000 INFO fine\n"
    )
    Image.new("RGB", (800, 300), (200, 0, 0)).save(folder / "predictions.png")
    return folder


def written(folder: Path) -> str:
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """The report of the run."""
    return written(run)


def test_page_loads_nothing(text: str) -> None:
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "a", "base", "form"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:image/").startswith("data:image/")
    assert "url(" not in text
    assert "@import" not in text
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")


def test_text_is_escaped(text: str) -> None:
    page = Page(text)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert EVIL in page.texts  # as a setting
    assert any(f"WARNING {EVIL}" in shown for shown in page.texts)
    assert "model/a<b>&" in page.texts
    assert not any("INFO fine" in shown for shown in page.texts)


def test_accessible(text: str) -> None:
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(heading["scope"] in ("col", "row") for heading in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    alts = [image["alt"] for image in page.all("img")]
    assert "Curve of validation top-1 accuracy, % by epoch: model from 10 to 95.25, EMA from 1 to 3" in alts
    assert "Curve of training loss by epoch: all terms from 3 to 1, mesa from 0.5 to 0.125" in alts


def test_content(run: Path, text: str) -> None:
    page = Page(text)
    for part in ("3 of 4 epochs", "95.50", "epoch 2, last 95.25", "torch", "9.9", "All 2 starts"):
        assert any(part in shown for shown in page.texts), part
    seed = page.texts.index("SEED")
    assert page.texts[seed : seed + 4] == ["SEED", "7", "0", SCHEMA["SEED"].help]
    settings = page.texts[
        page.texts.index("Settings that differ from the defaults") : page.texts.index("All 6 settings")
    ]
    assert "AMP" not in settings  # as by default
    kinds = [image["src"].split(";")[0] for image in page.all("img")]
    assert kinds == [*["data:image/svg+xml"] * 3, "data:image/png"]
    for uri in [image["src"] for image in page.all("img")] + [source["srcset"] for source in page.all("source")]:
        content = base64.b64decode(uri.split(",", 1)[1])
        if uri.startswith("data:image/svg"):
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content == (run / "predictions.png").read_bytes()


def test_a_bare_run_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = make_run(tmp_path / "bare", [1.0])
    (bare / "config.yaml").unlink()
    (bare / "speed.jsonl").unlink()
    texts = Page(written(bare)).texts
    assert any(text.startswith("epoch 1; report of") for text in texts)
    assert not {"Settings", "Environment", "Warnings", "Predictions"} & set(texts)
    (tmp_path / "mine.html").write_text("mine")
    for args in ([str(tmp_path)], [str(bare), "--output", str(tmp_path / "mine.html")]):
        assert exit_code(report.main, args) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "mine"
    written(bare)  # replaces its own


def browse(folder: Path, *flags: str) -> str:
    """Standard output of a headless browser with a profile of its own."""
    assert BROWSER is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([BROWSER, *fixed, *flags], capture_output=True, text=True, timeout=120, check=True).stdout


# A frame can be as narrow as needed, unlike a window; and the page's policy forbids scripts in the page itself.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><title></title>
<iframe width="{width}" height="1600" style="border: 0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const inner = frames[0], page = inner.document, images = [...page.images], style = inner.getComputedStyle(page.body);
  document.title = JSON.stringify({{
    width: inner.innerWidth, needed: page.documentElement.scrollWidth,
    shown: images.every(image => image.complete && image.naturalWidth > 0 && image.clientWidth > 0),
    light: images.map(image => image.currentSrc === image.src), ink: style.color, page: style.backgroundColor,
  }})
}})</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium, or google-chrome, is not installed")
@pytest.mark.parametrize(("is_dark", "width"), [(False, 1200), (True, 360)], ids=["light", "dark phone"])
def test_in_a_browser(run: Path, text: str, tmp_path: Path, is_dark: bool, width: int) -> None:
    """All images are shown, the page fits a narrow screen, and it follows the light or dark scheme."""
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=escape(text)), encoding="utf-8")
    flags = [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", f"--window-size={width},3000"]
    dom = browse(tmp_path, *flags, "--dump-dom", (tmp_path / "frame.html").as_uri())
    title = re.search(r"<title>(.+?)</title>", dom)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["width"] == width
    assert seen["needed"] <= width
    assert seen["shown"]
    assert seen["light"] == [*[not is_dark] * 3, True]  # two images per curve, one of the predictions
    assert (seen["ink"], seen["page"]) == (
        ("rgb(230, 230, 230)", "rgb(20, 22, 26)") if is_dark else ("rgb(26, 26, 26)", "rgb(255, 255, 255)")
    )
    screenshot = tmp_path / "page.png"
    browse(tmp_path, *flags, f"--screenshot={screenshot}", (run / "report.html").as_uri())
    pixels = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    assert pixels[2, 2].tolist() == ([20, 22, 26] if is_dark else [255, 255, 255])
    for color in ((108, 182, 255) if is_dark else (31, 119, 180), (200, 0, 0)):  # curves, predictions
        assert (abs(pixels - color).max(axis=2) < 12).sum() > 100
