"""report.html stands alone, hides nothing and escapes everything."""

from __future__ import annotations

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from research.core.hooks import JsonLines
from research.core.plots import Curve, log_ticks, panel, panels, thinned, ticks
from research.core.report import render, table, write_report

STEPS = np.arange(10, 1001, 10)
VERSIONS = {
    "python": "3.11.7",
    "jax": "0.10.2",
    "devices": {"cpu": 1},
    "cpu": {"model": "Some CPU", "cores": 2, "flags": "avx amx"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "earlier": [],
}
CONFIG = {"seed": 7, "model": {"width": 192, "rope": {"base": 10000.0}, "pattern": ["a", "b"]}}


class Page(html.parser.HTMLParser):
    """Checks nesting; collects attributes, text and the data of panels."""

    VOID = {"meta", "link", "img", "br", "line", "circle", "polyline", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def page(**changes):
    given = {
        "title": "runs/a",
        "series": {"train/loss": (STEPS, 1 / STEPS), "val/loss": (STEPS[9::10], 2 / STEPS[9::10])},
        "config": CONFIG,
        "versions": VERSIONS,
        "results": {"val/loss": 0.0125, "steps": 1000, "wall_seconds": 247.0, "state_sha256": "ab" * 32},
    }
    return render(**(given | changes))


def test_the_page_has_results_curves_config_and_versions():
    read = Page(
        page(tables=[("Table A", ("name", "value"), [("ours", 1.5), ("gzip", 1.926)])], samples=[("drawn", "def f():")])
    )
    results = ["val/loss", "0.0125", "1,000", "4:07", "abababababab", "finished", "Table A", "1.926", "def f():"]
    origin = ["Some CPU", "0123456789 and changes", "0.10.2", "avx amx", "width", "rope.base", '["a", "b"]']
    for word in results + origin:
        assert word in read.text, word
    assert read.tags.count("svg") == 1 and read.tags.count("polyline") == 2


def test_the_page_needs_nothing_from_outside():
    text = page(images=[("noise", np.zeros((3, 8, 8, 1), np.uint8))])
    assert "http" not in text and "//" not in re.sub(r"base64,[^\"]*|<script>.*?</script>", "", text, flags=re.S)
    links = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert len(links) == 4 and all(value.startswith("data:") for value in links)
    encoded = next(value for value in links if "base64" in value).split("base64,")[1]
    assert base64.b64decode(encoded).startswith(b"\x89PNG")


def test_the_page_serves_phones_and_dark_rooms():
    text = page()
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media (max-width" in text


def test_what_a_run_says_is_escaped():
    evil = "<script>alert(1)</script>&'\""
    text = page(
        title=evil, config={evil: evil}, samples=[(evil, evil)], tables=[(evil, (evil,), [(evil,)])],
        series={f"train/{evil}": (STEPS, 1 / STEPS)}, results={evil: 1.0},
    )  # fmt: skip
    assert "<script>alert" not in text
    assert Page(text).tags.count("script") == 1


def test_an_unfinished_run_with_nothing_logged_has_a_page():
    read = Page(page(series={}, results=None, versions={}))
    assert "unfinished" in read.text and "svg" not in read.tags


def test_series_share_panels_by_name_and_loss_comes_first():
    series = {
        "train/accuracy": (STEPS, STEPS / 1000), "train/grad_norm/mlp": (STEPS, 1 / STEPS), "val/loss": (STEPS, 1 / STEPS),
        "train/grad_norm/embed": (STEPS, 2 / STEPS), "train/loss": (STEPS, 1 / STEPS), "test/loss": (STEPS[:1], 1 / STEPS[:1]),
        "val/matrix": (STEPS[:2], np.zeros((2, 3, 3))), "val/bits": (STEPS, 1 / STEPS),
    }  # fmt: skip
    titles = [re.search("<h3>(.*?)</h3>", text)[1] for text in panels(series)]
    assert titles == ["loss", "bits", "accuracy", "grad_norm"]
    legends = [re.findall(r"</i>(.*?) <b>", text) for text in panels(series)]
    assert legends == [["train", "val"], ["val"], ["train"], ["train embed", "train mlp"]]


def points(text):
    return [[tuple(map(float, p.split(","))) for p in run.split()] for run in re.findall(r'polyline points="(.*?)"', text)]


def test_a_curve_is_drawn_where_its_values_are():
    (line,) = points(panel("x", [Curve("train", np.array([0, 50, 100]), np.array([0.0, 5.0, 10.0]))]))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert abs((x0 + x2) / 2 - x1) < 0.11 and abs((y0 + y2) / 2 - y1) < 0.11


def test_wide_ranges_are_logarithmic_and_say_so():
    text = panel("x", [Curve("train", np.array([0, 1, 2]), np.array([1e-4, 1e-2, 1.0]))])
    assert ">log</span>" in text
    ((_, y0), (_, y1), (_, y2)) = points(text)[0]
    assert abs((y0 + y2) / 2 - y1) < 0.11
    assert ">log</span>" not in panel("x", [Curve("train", np.array([0, 1, 2]), np.array([0.0, 1e-2, 1.0]))])


def test_nan_breaks_a_curve_and_is_null_in_its_data():
    text = panel("x", [Curve("train", np.arange(7), np.array([1, 2, np.nan, 4, 5, np.inf, 6.0]))])
    assert [len(run) for run in points(text)] == [2, 2, 1]
    data = json.loads(dict(Page(text).attributes)["data-curves"], parse_constant=pytest.fail)
    assert data["curves"][0]["y"] == [1, 2, None, 4, 5, None, 6]
    assert panel("x", [Curve("train", np.arange(3), np.full(3, np.nan))]) == ""


def test_members_are_bands_around_their_mean_and_a_dead_one_is_left_out():
    values = np.stack([STEPS * 1.0, STEPS * 2.0, STEPS * 3.0, np.full(len(STEPS), np.nan)], axis=1)
    text = panel("x", [Curve("train", STEPS, values)])
    assert text.count("<polygon") == 2 and "4 members" in text
    data = json.loads(dict(Page(text).attributes)["data-curves"])
    assert data["curves"][0]["y"][0] == 20.0


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_step():
    steps = np.arange(1, 100_001)
    curve = thinned(Curve("train", steps, np.where(steps % 2, 1.0, 3.0)))
    assert len(curve.steps) == 500 and curve.steps[-1] == 100_000
    assert np.allclose(curve.values, 2.0)
    assert len(panel("x", [Curve("train", steps, 1.0 / steps)])) < 40_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.0012, 0.0031), (1e6, 3e6), (5, 5)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 11 and all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in found)
    assert low == high or len(found) >= 3


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1), (0.5, 60), (1e-12, 1e12)])
def test_log_ticks_are_within(low, high):
    found = log_ticks(low, high)
    assert 3 <= len(found) <= 8 and all(low <= t <= high for t in found)


def test_columns_of_numbers_stand_under_each_other():
    text = table(("name", "bits", "steps"), [("a", 1.5, 1000), ("b", 0.7691, 20)])
    assert '<td class="n">1.500</td>' in text and '<td class="n">0.769</td>' in text and '<td class="n">1,000</td>' in text
    assert '<td class="n">1e-05</td>' in table(("x",), [(1.0,), (1e-5,)])
    with pytest.raises(ValueError, match=r"2 columns .* a row of 1: \['a'\]"):
        table(("x", "y"), [("a",)])


def test_write_report_reads_the_folder_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "versions.json").write_text(json.dumps(VERSIONS))
    hook = JsonLines(tmp_path / "metrics.jsonl")
    hook.start(0, 100, None)
    for step in (1, 2, 3):
        hook.log(step, {"loss": 1.0 / step})
    read = Page(write_report(tmp_path, results={"test/loss": 0.25}).read_text())
    assert tmp_path.name in read.text and "0.25" in read.text and "polyline" in read.tags
    assert "finished" in read.words and read.words[read.words.index("steps ") + 1] == "3"
