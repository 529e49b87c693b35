"""Parts of an HTML page that needs no other file: everything is in it, and what it shows of a run is escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

# No script, nothing from elsewhere: a page that is mailed around does nothing but show itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #595959; --line: #d9d9d9; --page: #ffffff; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a6a6a6; --line: #3d4148; --page: #14161a; --card: #1f2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.75rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
p { margin: 0.25rem 0; }
.soft, figcaption, caption { color: var(--soft); }
.cards { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1rem 0; }
.card { background: var(--card); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 0.5rem; padding: 0.75rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding-bottom: 0.5rem; }
.wide { overflow-x: auto; }
.wide img { min-width: 44rem; border-radius: 0.25rem; }
table { border-collapse: collapse; font-size: 0.9rem; min-width: min(100%, 32rem); }
th { white-space: nowrap; }
td { min-width: 6rem; }
td:nth-child(4) { min-width: 16rem; }
caption { text-align: left; padding-bottom: 0.5rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; min-width: 0; }
.key tbody th, pre { font-family: ui-monospace, monospace; font-size: 0.85rem; }
pre { white-space: pre-wrap; background: var(--card); border-radius: 0.5rem; padding: 0.75rem; margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.5rem 0; }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
"""


class Picture(NamedTuple):
    """A picture's bytes and kind, such as image/png."""

    content: bytes
    kind: str

    @property
    def uri(self) -> str:
        return f"data:{self.kind};base64,{base64.b64encode(self.content).decode()}"


def page(title: str, sections: Iterable[str], *, generator: str) -> str:
    """A whole page: a header and sections."""
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{escape(generator)}">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def header(title: str, *parts: str) -> str:
    """The page's heading of level 1, and parts that are HTML already."""
    return f"<header>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</header>"


def section(heading: str, *parts: str) -> str:
    """Parts that are HTML already below a heading; nothing where there are none."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def cards(facts: Iterable[tuple[str, str, str]]) -> str:
    """(what, value, remark) of figures to be seen first."""
    parts = [
        f'<div class="card">{escape(what)}<b>{escape(value)}</b><span class="soft">{escape(remark)}</span></div>'
        for what, value, remark in facts
    ]
    return '<div class="cards">' + "".join(parts) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, kind: str = "text") -> str:
    """A table whose first column names the rows.

    Args:
        kind: "number" sets other columns to the right, "key" the names in the letters of code.
    """
    cell = ' class="number"' if kind == "number" else ""
    headings = "".join(f'<th scope="col"{cell if i else ""}>{escape(text)}</th>' for i, text in enumerate(head))
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td{cell}>{escape(x)}</td>" for x in row[1:]) + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    whole = (
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table>"
    )
    return scrolling(whole, caption)


def figure(light: Picture, *, caption: str, alt: str, dark: Picture | None = None) -> str:
    """A picture below its caption, with another one for dark pages."""
    image = f'<img src="{light.uri}" alt="{escape(alt)}">'
    if dark is not None:
        image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark.uri}">{image}</picture>'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def curves(figures: Iterable[str]) -> str:
    """Figures beside each other, as many as fit."""
    return '<div class="curves">' + "\n".join(figures) + "</div>"


def scrolling(part: str, label: str) -> str:
    """What keeps a width at which it can be read, and scrolls on narrow screens."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{escape(label)}">{part}</div>'


def folded(summary: str, part: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{part}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
