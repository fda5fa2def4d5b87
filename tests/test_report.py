"""The report is one file that fetches nothing, shows text as text, and draws what it was given."""

import re
from html.parser import HTMLParser

import pytest

from twelve import report


class Tags(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = ("meta", "path", "circle")

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(tmp_path, *pieces):
    report.write_report(tmp_path / "r.html", "A & B", [("한국어 <1>", list(pieces))], "x < y")
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_page_is_whole_escaped_and_fetches_nothing(tmp_path):
    steps = list(range(1, 301))
    noisy = [2 + (-1) ** step * 0.1 for step in steps]
    page = page_of(
        tmp_path,
        report.tiles({"parameters": 4_100_000, "share": "7 %"}),
        report.facts({"command": "twelve demo && echo <b>"}),
        report.text("a < b"),
        report.table([{"a": 1, "b": "<td>"}, {"a": None, "b": 0.25}], caption="<caption>"),
        report.samples([{"prompt": "<script>alert(1)</script>", "text": "답: 3", "reasoning": "</details>"}]),
        report.samples([{"text": "4", "note": "<level>", "correct": True}]),
        report.curve("loss", {"train": (steps, noisy), "<val>": ([1, 300], [2.0, 1.5])}),
        report.bars("accuracy", {"<en>": (0.5, 0.05)}, high=1),
    )
    tags = Tags(page)
    assert "<script>alert(1)</script>" in tags.text and "</details>" in tags.text and "답: 3" in tags.text
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "img", "iframe", "b<", "val")]
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page)


@pytest.mark.parametrize("values", [[], [1.0], [3.0] * 3, [float("nan"), None], [0.0, 0.0], [-1.0, 1e-9], [1e12, 2e12]])
def test_any_series_can_be_drawn(values):
    svg = report.curve("t", {"s": (list(range(len(values))), values)})
    assert "nan" not in svg and "inf" not in svg
    Tags(svg)


def test_a_long_series_stays_small_and_keeps_its_extremes():
    steps = list(range(100_000))
    values = [1.0 + (step % 7) * 0.01 for step in steps]
    values[51_234] = 1.5
    svg = report.curve("t", {"s": (steps, values)})
    assert len(svg) < 40_000
    assert (51_234.0, 1.5) in report._thin(list(zip(map(float, steps), values, strict=True)))


def test_a_lone_spike_is_left_out_of_the_frame_and_told():
    values = [1.0 + 0.1 * (step % 2) for step in range(200)]
    values[100] = 50.0
    assert "1 of 200 points lie above the frame" in report.curve("t", {"s": (list(range(200)), values)})


def test_smoothing_keeps_a_line_and_its_ends():
    line = [(float(x), 3.0 * x) for x in range(500)]
    smooth = report._smooth(line)
    assert smooth[:-1] == [pytest.approx(point) for point in line[:-1]]
    assert not report._is_noisy(line)
    assert report._is_noisy([(x, (-1) ** x) for x in range(100)])


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 12_000, ["0", "5k", "10k", "15k"]),
        (0, 0.0004, ["0", "1e-4", "2e-4", "3e-4", "4e-4"]),
        (1.1, 2.4, ["1.0", "1.5", "2.0", "2.5"]),
    ],
)
def test_ticks_are_round_numbers_that_cover_the_range(low, high, labels):
    assert report._labels(report._ticks(low, high, 5)) == labels


def test_metrics_survive_a_cut_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 9.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert report.read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert report.read_metrics(tmp_path / "none.jsonl") == []


def test_training_curves_draw_every_number_once():
    rows = [{"step": s, "tokens": s * 8, "loss": 2.0, "odd_number": 1.0, "word": "x"} for s in (1, 2)]
    curves = report.training_curves([*rows, {"step": 3, "validation_loss": 2.5}])
    titles = [re.search("<b>(.*?)</b>", curve)[1] for curve in curves]
    assert titles == ["Loss", "Odd number", "Validation loss"]
