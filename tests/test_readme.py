import re

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_files_it_names_exist() -> None:
    names = re.findall(r"(?:cfgs|tests|models|data|utils|downstream)/[\w/]+\.(?:yaml|py|png)", TEXT)
    assert len(names) > 5
    assert all((ROOT / name).exists() for name in names)


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in TEXT
    assert "TODO" not in TEXT
