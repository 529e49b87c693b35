"""The pages of documentation: links, names of files, facts that stand in several places, and that they are finished."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.variants import RELEASED
from tests.documentation import pages
from tests.helpers import ROOT

PAGES = [ROOT / page for page in pages()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert all((page.parent / link).exists() for link in links)
    names = re.findall(r"(?:cfgs|tests|models|data|utils|downstream)/[\w/]+\.(?:yaml|py|png|md)", text)
    assert all((ROOT / name).exists() for name in names)
    assert page != ROOT / "README.md" or (links and len(names) > 5)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_sections_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)", page.read_text()):
        assert anchor in anchors(page.parent / path if path else page), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text()
    assert "TODO" not in page.read_text()


def test_tests_named_in_the_table_of_timm_exist() -> None:
    text = (ROOT / "models" / "README.md").read_text()
    rows = [line for line in text.splitlines() if "| ✓" in line or "| ✗" in line]
    files = ("models/test_timm_interface.py", "models/test_mlla.py", "utils/test_export.py")
    tests = "".join((ROOT / "tests" / name).read_text() for name in files)
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`(\w+)`", row.split("|")[3])
        assert names, row
        assert all(f"def test_{name}(" in tests for name in names), row


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_citation_file() -> None:
    """The file meets the Citation File Format 1.2.0, and names the same paper and version as other files."""
    content = citation()
    assert content["cff-version"] == "1.2.0"
    assert content["type"] in ("software", "dataset")
    paper = content["preferred-citation"]
    assert paper["type"] == "conference-paper"
    for entry in (content, paper):
        assert isinstance(entry["title"], str)
        assert all(
            {"name"} == set(author) or {"family-names", "given-names"} == set(author) for author in entry["authors"]
        )
    assert isinstance(content["message"], str)
    assert content["version"] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
    bibtex = " ".join((ROOT / "README.md").read_text().split("```bibtex")[1].split())
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{authors}}}" in bibtex
    assert f"title = {{{paper['title']}}}" in bibtex
    assert f"year = {{{paper['year']}}}" in bibtex
    assert f"booktitle = {{{paper['collection-title']}}}" in bibtex


def test_changelog() -> None:
    """Unreleased changes, then versions, the newest one that of the package, with Keep a Changelog's sections."""
    text = (ROOT / "CHANGELOG.md").read_text().replace("## [Unreleased]\n", "", 1)
    versions = re.findall(r"^## \[(.+?)\] - (?:unreleased|\d{4}-\d{2}-\d{2})$", text, re.M)
    assert versions[0] == citation()["version"]
    assert len(versions) == len(set(versions)) == len(re.findall(r"^## ", text, re.M))
    sections = set(re.findall(r"^### (.+)$", text, re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_model_card() -> None:
    """The metadata are a Hugging Face model card's; numbers and links equal the README's."""
    text = (ROOT / "models" / "MODEL_CARD.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "timm"
    assert metadata["pipeline_tag"] == "image-classification"
    scores = [entry["results"][0]["metrics"][0]["value"] for entry in metadata["model-index"]]
    assert [entry["name"] for entry in metadata["model-index"]] == [f"mlla_{size}.in1k" for size in RELEASED]
    assert f"| released weights | {' | '.join(map(str, scores))} |" in body
    assert all(link in body for link, _ in RELEASED.values())
    rows = [re.split(r" *\| *", line) for line in (ROOT / "README.md").read_text().splitlines() if "| MLLA-" in line]
    columns = list(zip(*(row[2:6] for row in rows[:3]), strict=True))
    for name, column in zip(("parameters", "MACs", "released weights", "without MESA"), columns, strict=True):
        (line,) = [line for line in body.splitlines() if line.startswith(f"| {name}")]
        assert re.split(r" *\| *", line)[2:5] == list(column)
