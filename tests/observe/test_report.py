import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from grpo.errors import CheckpointError
from grpo.observe.figures import PLOTS
from grpo.observe.report import examples, summarize_run, write_report
from tests.runs import HOSTILE, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ALL_PLOTS = [plot.title for plot in PLOTS] + ["Time by phase", "What each pool did"]


class Page(HTMLParser):
    """The text of a page and its elements, read as a browser would."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.shown, self.links, self.inside = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.shown.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.shown).split())


def open_in_browser(path, profile):
    """The DOM after the scripts have run, and what they wrote to the console (errors included)."""
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={profile}"]
        + ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()],
        capture_output=True,
        timeout=180,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn_plots(dom):
    """How many plots hold a drawing with a line, points or bars."""
    plots = dom.split('<div class="plot')[1:]
    return sum('class="main-svg"' in plot and bool(re.search(r'class="trace (scatter|bars)', plot)) for plot in plots)


browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium (Debian package chromium) is not installed"),
]


class TestInBrowser:
    pytestmark = browser

    def test_a_full_run_is_drawn_without_console_errors(self, tmp_path):
        path = write_report(write_run(tmp_path / "run", steps=6, eval_every=2))
        dom, console = open_in_browser(path, tmp_path / "profile")
        assert console == []
        assert drawn_plots(dom) == len(ALL_PLOTS) + 1  # six steps are two stretches of what each pool did

    def test_a_run_of_one_step_with_hostile_text(self, tmp_path):
        path = write_report(write_run(tmp_path / "run", steps=1, text=HOSTILE + "</script><script>oops()</script>"))
        dom, console = open_in_browser(path, tmp_path / "profile")
        assert console == []
        assert drawn_plots(dom) == len(ALL_PLOTS) - 1  # nothing was evaluated
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom
        assert "<img" not in dom

    def test_an_error_in_a_script_would_be_seen(self, tmp_path):
        path = write_report(write_run(tmp_path / "run", steps=1))
        path.write_text(path.read_text().replace("Plotly.newPlot(element", "Plotly.newPlott(element"))
        dom, console = open_in_browser(path, tmp_path / "profile")
        assert any("newPlott is not a function" in line for line in console)
        assert drawn_plots(dom) == 0

    def test_a_request_to_the_outside_would_be_seen(self, tmp_path):
        path = write_report(write_run(tmp_path / "run", steps=1))
        path.write_text(path.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
        _, console = open_in_browser(path, tmp_path / "profile")
        assert any("Content Security Policy" in line for line in console)


def test_the_page_holds_everything_itself(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", steps=2, eval_every=1)).read_text())
    assert page.links == ["data:,"]
    assert page.tags.count("script") == 2
    assert page.tags.count("figure") == len(ALL_PLOTS)


def test_the_head_says_how_the_run_went(tmp_path):
    text = Page(write_report(write_run(tmp_path / "run", steps=4, eval_every=2)).read_text()).text
    assert "fake finished" in text
    assert "Held-out accuracy 0.25 → 0.85 +0.60 from first to last" in text
    assert "Mean reward 0.31 → 0.69" in text
    assert "Steps 4 of 4 planned" in text
    assert "Model models/tiny" in text
    assert f"Command grpo train run.yaml run.dir={tmp_path}/run" in text


def test_examples_show_the_same_held_out_prompts_before_and_after(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=4, eval_every=2)
    held_out, training = examples(run_dir / "samples.jsonl")
    assert held_out["paired"]
    assert [[row["step"] for row in pair] for pair in held_out["rows"]] == [[0, 4]] * 3
    assert [[row["prompt_id"] for row in pair] for pair in held_out["rows"]][1] == ["fake:1", "fake:1"]
    assert [[row["step"] for row in pair] for pair in training["rows"]] == [[1, 4]] * 2
    text = Page(write_report(run_dir).read_text()).text
    assert "#### 4 after 0 (0)" in text and "#### 4 after 4 (0)" in text and "#### 4 after 2" not in text
    assert "and 4 more in samples.jsonl" in text


def test_a_run_of_one_step(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", steps=1)).read_text())
    assert "Mean reward 0.69 measured once" in page.text
    assert "Held-out accuracy" not in page.text
    assert "Completions of step 1, with their rewards." in page.text


def test_a_run_without_a_step_says_so(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", steps=0)).read_text())
    assert "finished no step" in page.text
    assert page.tags.count("figure") == 0 and page.tags.count("script") == 0


def test_a_killed_run(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=3, end=False)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    text = Page(write_report(run_dir).read_text()).text
    assert "fake running or killed" in text
    assert "Steps 3 of 3 planned" in text


def test_a_run_killed_before_its_config_was_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = Page(write_report(tmp_path).read_text()).text
    assert "finished no step" in text and "Model unknown" in text


def test_a_failed_run_shows_its_error_escaped(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=1, end=False)
    end = {"event": "end", "step": 1, "time": 2e9, "outcome": "RewardError", "message": "<b>bad</b>\x1b"}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(end) + "\n")
    page = Page(write_report(run_dir).read_text())
    assert "ended by RewardError" in page.text and "<b>bad</b>\\x1b" in page.text
    assert "b" not in page.tags


def test_hostile_text_is_escaped_everywhere(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=1, eval_every=1, text=HOSTILE)
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        text = path.read_text().replace("models/tiny", "<script>alert(3)</script>")
        path.write_text(text.replace("what is 2 + 2?", "<script>alert(4)</script>").replace("run.yaml", "<script>"))
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    for number in (1, 3, 4):
        assert f"<script>alert({number})</script>" in page.text
    assert "\x1b" not in html and "\u202e" not in html and "{{ 7 * 7 }}" in page.text


def test_lone_surrogates_do_not_stop_the_report(tmp_path):
    write_report(write_run(tmp_path / "run", steps=1, text="\ud800"))


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match="metrics.jsonl"):
        write_report(tmp_path / "none")


def test_a_damaged_row_is_named(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=1)
    path = run_dir / "metrics.jsonl"
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(CheckpointError, match="metrics.jsonl:1"):
        write_report(run_dir)


def test_a_second_report_replaces_the_first(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=1)
    first = write_report(run_dir).read_text()
    assert write_report(run_dir).read_text() == first
    assert not list(run_dir.glob("*.tmp"))


def test_summary_of_nothing():
    summary = summarize_run([], {})
    assert (summary["steps"], summary["accuracy"], summary["wall"]) == (0, None, "0:00")


def test_the_template_is_packaged():
    assert files("grpo.observe").joinpath("report.html.j2").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["grpo"]
