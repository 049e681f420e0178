"""The report: one page without outside references, in a real browser where there is one."""

from __future__ import annotations

import base64
import html
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from dha_peft.plan import DHAPlan, LayerPlan, contiguous_groups
from dha_peft.report import write_report

PLAN = DHAPlan((LayerPlan(contiguous_groups(4, 2), contiguous_groups(4, 1)),) * 3, 8)
LOG = [
    {"step": s, "dha/fusion_loss": 1 / s, "dha/target": 1 / s, "dha/lambda1": s, "dha/lambda2": s} for s in range(1, 6)
]
SPEED = {"ms_per_step": 2.0, "cache_bytes": 1000}
FACTS = {
    "base": "org/<base>", "budget": 0.375, "plan": PLAN.to_dict(), "method": {"fusion": "aligned"}, "fusion": LOG,
    "kv_bytes_measured": {"before": 1000, "after": 375}, "losses": {"base": 3.0, "closed form": 3.2},
    "similarity": [{"layer": 0, "kind": "key", "raw": [[1, 0], [0, 1]], "aligned": [[1, 0.9], [0.9, 1]]}],
    "scores": [{"task": "cloze", "metric": "acc", "base": [0.5, 0.1], "result": [0.4, None]}],
    "speed": {"batch": 1, "context": 8, "device": "cpu", "base": SPEED, "result": SPEED},
}  # fmt: skip


class Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.titles, self.outside, self.ids, self.inside = [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "h2"
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        if self.inside:
            self.titles.append(data)
            self.inside = False


def test_the_page_stands_alone(tmp_path):
    page = write_report(tmp_path, FACTS).read_text()
    parser = Parser()
    parser.feed(page)
    wanted = {"Budgets by layer", "Head similarity", "Fusion", "Quality against KV kept", "Decoding", "lm-eval"}
    assert wanted <= set(parser.titles)
    assert [link for link in parser.outside if not link.startswith("data:")] == []
    assert len(parser.ids) == len(set(parser.ids))
    assert "org/&lt;base&gt;" in page and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    names = {"budgets", "quality", "similarity-key-0", "fusion-loss", "fusion-multipliers", "speed-step", "speed-cache"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in names}


def test_sections_without_facts_are_left_out(tmp_path):
    page = write_report(tmp_path, {"base": "b", "budget": 0.25}).read_text()
    assert "<section>" not in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What the page looks like, on a desk and in a frame as wide as a phone, as the title of a page around it.
AROUND = """<!doctype html><iframe id="desk" style="width: 1100px"></iframe><iframe id="phone" style="width: 360px"></iframe><script>
const page = atob("%s"), found = {};
const frames = [...document.querySelectorAll("iframe")].map(frame => new Promise(done => {
  frame.srcdoc = page;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement, style = frame.contentWindow.getComputedStyle;
    const svgs = [...root.querySelectorAll("svg")];
    found[frame.id] = {
      wide: root.scrollWidth, inner: frame.contentWindow.innerWidth, paper: style(root.querySelector("body")).backgroundColor,
      ink: style(svgs[0]).color, smallest: Math.min(...svgs.map(svg => svg.getBoundingClientRect().width)),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    };
    done();
  };
}));
Promise.all(frames).then(() => document.title = JSON.stringify(found));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(tmp_path, dark):
    """No sideways scrolling, readable in both colour schemes, nothing loaded, nothing on the console."""
    page = base64.b64encode(write_report(tmp_path, FACTS).read_bytes()).decode()
    around = tmp_path / "around.html"
    around.write_text(AROUND % page)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1600,900",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(done.stdout.split("<title>")[1].split("</title>")[0]))
    assert set(found) == {"desk", "phone"}
    for view in found.values():
        assert view["wide"] <= view["inner"] and view["requests"] == []
        assert (brightness(view["paper"]) < 60, brightness(view["ink"]) > 200) == (dark, dark)
        assert view["smallest"] > 0.8 * min(view["inner"] - 80, 380)


def brightness(colour: str) -> float:
    """Mean of red, green and blue of `rgb(...)`."""
    return sum(map(float, colour.split("(")[1].rstrip(")").split(",")[:3])) / 3
