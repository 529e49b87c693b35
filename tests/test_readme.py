"""The pages of documentation: links, names of files, and that they are finished."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [
    path
    for path in sorted(ROOT.glob("**/README.md"))
    if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert all((page.parent / link).exists() for link in links)
    names = re.findall(r"(?:cfgs|tests|models|data|utils|downstream)/[\w/]+\.(?:yaml|py|png|md)", text)
    assert all((ROOT / name).exists() for name in names)
    assert page.parent != ROOT or (links and len(names) > 5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text()
    assert "TODO" not in page.read_text()
