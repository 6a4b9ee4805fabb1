"""The report's HTML: one file, no script, no outside resource; colours follow the reader's dark or light setting."""

import html
from collections.abc import Sequence

# Okabe and Ito's palette, which colour-blind readers tell apart; the dark page takes lighter shades of blue and green.
_CSS = """
:root { color-scheme: light dark; --paper:#fff; --card:#f7f8fa; --ink:#1c2330; --faint:#66707f; --grid:#dfe3e8; --line:#dfe3e8;
  --cost:#d55e00; --gain:#0072b2; --alarm:#b3261e; --alarm-bg:#fdeceb; --good:#00664b;
  --s0:#0072b2; --s1:#d55e00; --s2:#009e73; --s3:#aa4499; --s4:#b8860b; --s5:#3aa0dc; --s6:#555; --s7:#882255; }
@media (prefers-color-scheme: dark) { :root { --paper:#12161c; --card:#1a2029; --ink:#e6eaf0; --faint:#98a3b3; --grid:#2c3542;
  --line:#2c3542; --cost:#f0883e; --gain:#56b4e9; --alarm:#ff8a80; --alarm-bg:#3a1c1b; --good:#4fd1a5;
  --s0:#56b4e9; --s1:#f0883e; --s2:#3ddc97; --s3:#e39bd0; --s4:#f0e442; --s5:#9ecbff; --s6:#c0c0c0; --s7:#ff9eb1; } }
* { box-sizing: border-box; }
body { margin:0 auto; padding:2.2rem 1.4rem 4rem; max-width:76rem; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui, sans-serif; }
h1 { font-size:1.7rem; margin:0 0 .2rem; letter-spacing:-.01em; } h2 { font-size:1.2rem; margin:2.6rem 0 .3rem; }
h3 { font-size:.95rem; margin:0 0 .5rem; } p { margin:.3rem 0 .9rem; max-width:62rem; } .faint { color:var(--faint); }
code { font:.88em ui-monospace, monospace; background:var(--card); padding:.1em .35em; border-radius:4px;
  overflow-wrap:anywhere; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(8.6rem,1fr)); gap:.8rem; margin:1.2rem 0; }
.tile, .card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:.9rem 1rem; }
.tile { padding:.8rem; }
.tile b { display:block; font-size:1.3rem; line-height:1.3; white-space:nowrap; letter-spacing:-.02em;
  font-variant-numeric:tabular-nums; }
.tile span { color:var(--faint); font-size:.86rem; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(30rem,100%),1fr)); gap:.9rem; margin:.8rem 0; }
.card { overflow-x:auto; } .card svg { width:100%; max-width:44rem; height:auto; display:block; }
.card p { font-size:.88rem; color:var(--faint); margin:.5rem 0 0; }
.alarm { background:var(--alarm-bg); border:1px solid var(--alarm); border-radius:10px; padding:.7rem 1rem; margin:.6rem 0; }
.alarm b { color:var(--alarm); } .calm b { color:var(--good); }
table { border-collapse:separate; border-spacing:2px; font-variant-numeric:tabular-nums; font-size:.88rem; width:100%; }
th { font-weight:600; color:var(--faint); padding:.25rem .4rem; text-align:right; vertical-align:bottom; }
td { padding:.3rem .5rem; text-align:right; white-space:nowrap; border-radius:4px; }
.rows { border-spacing:0; } .rows td, .rows th { border-bottom:1px solid var(--line); border-radius:0; }
.rows td:first-child, .rows th:first-child, .facts td, .facts th { text-align:left; white-space:normal; }
.heat { font-size:.84rem; } .heat td { min-width:2.6rem; padding:.3rem .1rem; text-align:center; }
.heat th { text-align:center; }
.heat th { white-space:nowrap; } .heat th:first-child { text-align:right; width:1%; padding-left:0; }
.none { color:var(--faint); }
@media print { body { max-width:none; } .card { break-inside:avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def text(value: object) -> str:
    """Escaped text."""
    return html.escape(str(value))


def tile(figure: str, meaning: str) -> str:
    """One headline figure."""
    return f'<div class="tile"><b>{text(figure)}</b><span>{text(meaning)}</span></div>'


def card(title: str, content: str, note: str = "") -> str:
    """A picture or a table with its title and a sentence on how to read it; empty without content."""
    if not content:
        return ""
    return f'<div class="card"><h3>{text(title)}</h3>{content}{f"<p>{text(note)}</p>" if note else ""}</div>'


def rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A plain table."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values."""
    lines = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in pairs)
    return f'<table class="rows facts"><tbody>{lines}</tbody></table>'


Shade = tuple[str, float | None]  # what the cell says, and how strongly it is coloured from 0 to 1 (None: not at all)


def heat(corner: str, columns: Sequence[str], body: Sequence[tuple[str, Sequence[Shade]]], colour: str) -> str:
    """A heat map as a table, so that its figures can be read, copied and heard; `colour` is `cost` or `gain`."""
    head = f"<th>{text(corner)}</th>" + "".join(f"<th>{text(column)}</th>" for column in columns)
    lines = "".join(
        f"<tr><th>{text(name)}</th>{''.join(_shaded(shade, colour) for shade in shades)}</tr>" for name, shades in body
    )
    return f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _shaded(shade: Shade, colour: str) -> str:
    shown, strength = shade
    if strength is None:
        return f'<td class="none">{text(shown)}</td>'
    # Up to half: beyond it the ink would no longer stand out on either page.
    percent = round(6 + 48 * min(1, max(0, strength)))
    return f'<td style="background:color-mix(in oklab,var(--{colour}) {percent}%,var(--card))">{text(shown)}</td>'
