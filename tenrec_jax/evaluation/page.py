"""HTML building blocks of the report. All text is escaped here; the functions return markup, which nothing escapes again."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{--ink:#1b1f24;--page:#fff;--line:#d0d5da;--soft:#f3f5f7}
@media screen and (prefers-color-scheme:dark){
:root{color-scheme:dark;--ink:#e6e8ea;--page:#14171a;--line:#3a4148;--soft:#20252a}}
body{margin:0 auto;padding:1rem;max-width:62rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page)}
h1,h2,p,dd,li{overflow-wrap:anywhere}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
.verdict{font-size:1.2rem;padding:.8rem 1rem;background:var(--soft);border-left:4px solid #2f7fd1}
.scroll,pre{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child{text-align:left;white-space:nowrap;padding-left:0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem 1rem}
dt{font-weight:600}dd{margin:0}pre{font-size:.85rem}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;max-width:100%}figcaption{font-size:.9rem}
svg{max-width:100%;height:auto}svg *{stroke-linejoin:round}
@media print{body{max-width:none;padding:0;font-size:10pt}table{font-size:8pt}.scroll{overflow:visible}
pre{white-space:pre-wrap}h2,h3,caption{break-after:avoid}figure,tr{break-inside:avoid}
details::details-content{content-visibility:visible}}
"""


def document(title: str, verdict: str, sections: Mapping[str, str]) -> str:
    """The whole page: a title, the verdict, and sections by heading."""
    body = "".join(f"<section>\n<h2>{escape(name)}</h2>\n{markup}</section>\n" for name, markup in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict)}</p>
{body}</main>
</body>
</html>
"""


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>\n"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>\n"


def bullets(lines: Sequence[str]) -> str:
    """A list; nothing if it is empty."""
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n" if lines else ""


def facts(values: Mapping[str, Any]) -> str:
    """Names and values."""
    entries = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>\n" for name, value in values.items())
    return "<dl>\n" + "".join(entries) + "</dl>\n"


def folded(summary: str, text: str) -> str:
    """Preformatted text that is shown on demand, and in print."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre>\n</details>\n"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box of its own, which scrolls; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f'<tr><th scope="row">{escape(first)}</th>{_cells(rest)}</tr>\n' for first, *rest in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _cells(cells: Iterable[str]) -> str:
    # A narrow cell may break before its interval, not within.
    return "".join(f"<td>{escape(cell).replace(', ', ',&nbsp;')}</td>" for cell in cells)
