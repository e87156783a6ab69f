"""What the pages share.  Each is a single file that loads nothing else: no script, font or picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

# Characters that HTML does not allow; a model with random weights can write them.
_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --ink: #1c2024; --quiet: #5b6470;
  --line: #d9dde3; --side0: #2563c9; --side1: #b4540a; --mark: #fde9c8; --warn: #8a1c1c; --link: #1d4fa3 }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --panel: #1e2327; --ink: #e6e9ec; --quiet: #9aa5b1;
  --line: #363d44; --side0: #3f7ad6; --side1: #bf6a26; --mark: #54411f; --warn: #ff9d9d;
  --link: #8db8ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif }
h1 { font-size: 1.6rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
h3 { font-size: .95rem; margin: 0 0 .4rem }
p { margin: .4rem 0; max-width: 75ch }
a { color: var(--link) }
figure { margin: 0 }
.quiet { color: var(--quiet) }
.warn { color: var(--warn); font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal }
thead th { color: var(--quiet); font-weight: 500; font-size: .85rem }
td small { display: block; color: var(--quiet) }
.name { display: inline-block; margin-right: 1em }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em }
.side0 { fill: var(--side0); background: var(--side0) } .side1 { fill: var(--side1); background: var(--side1) }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; max-width: 52rem }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font-size: 13px; font-family: inherit }
svg .title { font-weight: 600 } svg .tick { fill: var(--quiet); font-size: 11px }
svg .grid { stroke: var(--line) } svg .whisker { stroke: var(--ink) }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: .6rem 0 1rem }
.text { background: var(--panel); border-radius: 6px; padding: .8rem; max-height: 24rem; overflow: auto }
.text div { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem }
.text p { font-size: .8rem; margin: .6rem 0 0 }
mark { background: var(--mark); color: inherit }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere }
@media (max-width: 70rem) {
  body { padding: 1rem }
  .figures thead { display: none }
  .figures, .figures tbody, .figures tr, .figures td { display: block }
  .figures { max-width: 30rem }
  .figures tr { padding: .6rem 0; border-bottom: 1px solid var(--line) }
  .figures td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0 }
  .figures td:first-child { display: block; font-weight: 600 }
  .figures td[data-name]::before { content: attr(data-name); color: var(--quiet) }
  .figures td small { display: inline; margin-left: .6em }
  .settings, .settings tbody, .settings tr, .settings td { display: block; padding: 0; border: 0 }
  .settings td:first-child { color: var(--quiet); padding-top: .5rem }
}
@media print { details:not([open]) > * { display: block } .text { max-height: none } }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A page.  title: text; parts: HTML of its body"""
    head = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def text(value: Any) -> str:
    """`value` as HTML text, also within an attribute's quotes."""
    return escape(_NOT_HTML.sub("\ufffd", str(value)), quote=True)


def figures_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose rows become lists on a narrow screen.  columns: text; rows: HTML, the first cell names the row"""
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    yield f'<table class="figures"><thead><tr>{heads}</tr></thead><tbody>'
    for first, *rest in rows:
        named = zip(columns[1:], rest, strict=True)
        cells = "".join(f'<td data-name="{text(name)}"><span>{cell}</span></td>' for name, cell in named)
        yield f"<tr><td>{first}</td>{cells}</tr>"
    yield "</tbody></table>"


def key(css: str, label: str) -> str:
    """A side's colour and its label."""
    return f'<span class="key {css}"></span>{text(label)}'
