"""A run on one page: report.html stands alone, with no resource outside it, and reads on a phone and by night."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core import files
from research.core.config import flat
from research.core.hooks import Series, is_image, read_lines, read_series
from research.core.images import png
from research.core.plots import panels
from research.core.progress import duration, short
from research.core.report_style import CSS, SCRIPT

Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]  # title, header, rows
_PANELS = 12  # shown at once; the others unfold
_KNOWN = ("steps", "wall_seconds", "state_sha256")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "–" if value is None else "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return f"{number:.4g}" if abs(number) < 1e5 else short(number)
    return html.escape(str(value))


def _column(values: Sequence[float]) -> list[str]:
    """Numbers under each other: to as many decimals as give the largest four digits, unless that hides the smallest."""
    sizes = [abs(float(v)) for v in values if v and np.isfinite(v)]
    decimals = 3 - math.floor(math.log10(max(sizes))) if sizes else 0
    whole = all(float(v).is_integer() for v in values)
    if whole or not 0 <= decimals <= 6 or min(sizes) < 10.0 ** (1 - decimals):
        return [f"{int(v):,}" if whole else _cell(float(v)) for v in values]
    return [f"{float(v):.{decimals}f}" for v in values]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; columns of numbers stand to the right. Raises ValueError where a row is not as long as the header."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a table of {len(header)} columns {list(header)} was given a row of {len(row)}: {list(row)}")
    columns = [[row[i] for row in rows] for i in range(len(header))]
    numeric = [bool(rows) and all(isinstance(value, (int, float, np.number)) for value in column) for column in columns]
    shown = [_column(column) if is_numeric else map(_cell, column) for is_numeric, column in zip(numeric, columns)]

    def line(kind: str, cells: Iterable[str]) -> str:
        marks = (' class="n"' if n else "" for n in numeric)
        return "<tr>" + "".join(f"<{kind}{mark}>{cell}</{kind}>" for mark, cell in zip(marks, cells)) + "</tr>"

    head = line("th", (html.escape(str(name)) for name in header))
    return f'<div class="scroll"><table>{head}{"".join(line("td", row) for row in zip(*shown))}</table></div>'


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    shown = "".join(f'<tr><td class="key">{html.escape(k)}</td><td class="value">{_cell(v)}</td></tr>' for k, v in rows)
    return f'<div class="scroll"><table>{shown}</table></div>'


def _rows(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(k, json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v) for k, v in flat(config)]


def _config(config: Mapping[str, Any]) -> str:
    """A card a section, and one of what stands at the top."""
    sections = {k: v for k, v in config.items() if isinstance(v, Mapping) and v}
    top = _rows({k: v for k, v in config.items() if k not in sections})
    cards = [("", top)] if top else []
    cards += [(name, _rows(section)) for name, section in sections.items()]
    return '<div class="columns">' + "".join(_card(name, _pairs(rows)) for name, rows in cards) + "</div>"


def _card(title: str, body: str, wide: bool = False) -> str:
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f'<div class="card{" wide" if wide else ""}">{heading}{body}</div>'


def _tables(tables: Sequence[Table]) -> str:
    cards = "".join(_card(name, table(header, rows), wide=len(header) > 4) for name, header, rows in tables)
    return f'<div class="grid2">{cards}</div>' if cards else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _image(title: str, image: np.ndarray) -> str:
    encoded = base64.b64encode(png(image)).decode()
    small = ' class="small"' if max(image.shape[:2]) <= 64 else ""
    caption = html.escape(title)
    picture = f'<img alt="{caption}" src="data:image/png;base64,{encoded}">'
    return f"<figure{small}>{picture}<figcaption>{caption}</figcaption></figure>"


def _images(images: Iterable[tuple[str, np.ndarray]]) -> str:
    each = []
    for title, image in images:
        stack = image if is_image(image) and image.ndim == 4 else [image]
        each += [_image(f"{title} {i}" if len(stack) > 1 else title, one) for i, one in enumerate(stack)]
    return f'<div class="images">{"".join(each)}</div>' if each else ""


def _numbers(results: Mapping[str, Any]) -> str:
    scalars = {k: v for k, v in results.items() if k not in _KNOWN and isinstance(v, (int, float)) and not isinstance(v, bool)}
    cards = "".join(f"<div><span>{html.escape(k)}</span><b>{_cell(float(v))}</b></div>" for k, v in scalars.items())
    return f'<div class="numbers">{cards}</div>' if cards else ""


def _facts(results: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    devices = ", ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in versions.get("devices", {}).items())
    git = versions.get("git") or {}
    facts = {
        "steps": f"{results['steps']:,}" if "steps" in results else "",
        "wall time": duration(results["wall_seconds"]) if "wall_seconds" in results else "",
        "devices": devices,
        "processor": versions.get("cpu", {}).get("model", ""),
        "jax": versions.get("jax", ""),
        "commit": git.get("commit", "")[:10] + (" and changes" if git.get("dirty") else ""),
        "state sha256": results.get("state_sha256", "")[:12],
    }
    return "".join(f"<span>{name} <b>{html.escape(str(value))}</b></span>" for name, value in facts.items() if value)


def render(
    title: str,
    series: Series,
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    tables: Sequence[Table] = (),
    samples: Sequence[tuple[str, str]] = (),
    images: Sequence[tuple[str, np.ndarray]] = (),
) -> str:
    """The page. series: {name: (steps, values)} as `read_series` gives them. config, versions: plain, as in their files.
    results: as in summary.json; None while the run is unfinished. tables: (title, header, rows). samples: (title, text).
    images: (title, uint8 array [(n,) height, width, 1 | 3 | 4])."""
    state = "unfinished" if results is None else "finished"
    results = results or {}
    curves = panels(series)
    shown = f'<div class="grid2">{"".join(curves[:_PANELS])}</div>' if curves else ""
    if curves[_PANELS:]:
        rest = "".join(curves[_PANELS:])
        shown += f'<details><summary>{len(curves) - _PANELS} more</summary><div class="grid2">{rest}</div></details>'
    flags = versions.get("cpu", {}).get("flags", "")
    told = [(k, v) for k, v in _rows({k: v for k, v in versions.items() if k != "earlier"}) if k != "cpu.flags"]
    sections = [
        _section("Results", _numbers(results)),
        _section("Tables", _tables(tables)),
        _section("Curves", shown),
        _section("Samples", "".join(_card(name, f"<pre>{html.escape(text)}</pre>") for name, text in samples)),
        _section("Images", _images(images)),
        _section("Config", _config(config)),
        _section("Made with", _card("", _pairs([*told, ("cpu.flags", flags)]))),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{CSS}</style></head><body><main>'
        f'<header><h1>{html.escape(title)}<span class="state {state}">{state}</span></h1>'
        f'<div class="facts">{_facts(results, versions)}</div></header>'
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def write_report(
    workdir: Path,
    results: Mapping[str, Any] | None = None,
    tables: Sequence[Table] = (),
    samples: Sequence[tuple[str, str]] = (),
    images: Sequence[tuple[str, np.ndarray]] = (),
) -> Path:
    """Writes `workdir`/report.html from what the folder of the run holds and what is given, as `render` takes it; its path.
    Steps and wall time are those of the last line of metrics.jsonl unless `results` say them."""
    lines = read_lines(workdir / "metrics.jsonl")
    if results is not None and lines:
        results = {"steps": lines[-1]["step"], "wall_seconds": lines[-1]["seconds"]} | dict(results)
    config, versions = (json.loads((workdir / name).read_bytes()) for name in ("config.json", "versions.json"))
    series = read_series(workdir / "metrics.jsonl")
    page = render(workdir.name, series, config, versions, results, tables, samples, images)
    path = workdir / "report.html"
    files.write_whole(path, page.encode())
    return path
