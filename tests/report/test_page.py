"""The report: one page without outside references, in a real browser where there is one."""

from __future__ import annotations

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
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "budgets.png", "similarity.png", "fusion.png", "quality.png", "speed.png"
    }  # fmt: skip


def test_sections_without_facts_are_left_out(tmp_path):
    page = write_report(tmp_path, {"base": "b", "budget": 0.25}).read_text()
    assert "<section>" not in page


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_it_without_sideways_scrolling(tmp_path, width):
    """500 pixels is the narrowest window that headless chromium opens."""
    page = write_report(tmp_path, FACTS)
    script = (
        "<script>document.title = 'width ' + document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", script))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    wide, inner = done.stdout.split("<title>width ")[1].split("</title>")[0].split(" of ")
    assert int(wide) <= int(inner)
