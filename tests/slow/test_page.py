"""study/page.py: report.html is whole by itself, and in a real browser its controls change what is drawn."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import TINY

from plumbing.files import UserError
from study import page, results
from study.drawing import by_drag, colour_of
from train import main, parse_args

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two small runs with diagnostics, and the runs."""
    out = tmp_path_factory.mktemp("runs")
    main(parse_args([*TINY, "--lr", "3e-3", "--diagnostics", "--out", str(out), "--jobs", "1"]))
    command = [sys.executable, "-m", "study.page", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page          {out / 'figures' / 'report.html'}"
    return out / "figures" / "report.html", results.read_folder(out)


def test_the_page_holds_the_runs_and_loads_nothing(report):
    text, runs = report[0].read_text(), report[1]
    own = text[: text.index("<script>")] + text[text.rindex("<script>") :]  # without plotly's own source
    assert not re.search(r"""(src|href|url)\s*[=(]""", own) and "http" not in own
    data = json.loads(re.search(r"^const runs = (.*);$", own, flags=re.M)[1])
    assert [run["label"] for run in data] == ["Off-RL", "FPA, λ = 2"]
    assert [run["colour"] for run in data] == [colour_of("off_rl"), colour_of("fpa")]
    table, pairs = runs[0].tables["tokens"], list(by_drag(runs[0].tables["tokens"]))
    at = (table["pair"] == pairs[int(0.1 * len(pairs))]) & (table["side"] == "correct")
    drawn = [" ".join(f"{x:g}" for x in frame["correct"]["ratios"]) for frame in data[0]["frames"]]
    assert drawn == table["logratios"][at].tolist()  # of the pair that is hit
    for shown, run in zip(data, runs):
        assert shown["steps"] == [0, 5, 10] and shown["curves"]["accuracy"] == pytest.approx(run.log["accuracy"], abs=1e-3)
        for side, tokens in shown["tokens"].items():
            frames = [frame[side] for frame in shown["frames"]]
            assert all(len(frame["ratios"]) == len(frame["future"]) == len(tokens) for frame in frames)
            assert set(frames[0]["ratios"]) == {0.0}  # the reference itself
            logps = [ref + ratio for ref, ratio in zip(shown["ref"][side], frames[-1]["ratios"])]
            same = logps == pytest.approx(frames[-1]["future"], abs=0.002)
            assert same == (shown["label"] == "Off-RL")  # whose λ is 0
    assert text.count("<tr><td>C") == 17


@pytest.mark.skipif(not BROWSER, reason="no chromium")
def test_the_page_in_a_browser(report):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for width in (1200, 390):
            tab, complaints = browser.new_page(viewport={"width": width, "height": 900}), []
            tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None)
            tab.goto(report[0].as_uri())
            tab.wait_for_selector("#heat .heatmaplayer")
            pictures = [tab.locator("#heat").screenshot()]
            cursor = tab.locator("#curves .shapelayer path").first
            before = cursor.get_attribute("d")
            tab.focus("#step")
            tab.keyboard.press("End")  # by keyboard alone
            assert tab.inner_text("#at") == "10 of 10" and cursor.get_attribute("d") != before
            pictures.append(tab.locator("#heat").screenshot())
            tab.select_option("#run", label="FPA, λ = 2")
            pictures.append(tab.locator("#heat").screenshot())
            assert len(set(pictures)) == 3 and not complaints
            assert tab.evaluate("document.documentElement.scrollWidth") <= width  # only the token row scrolls sideways
            tab.close()
        browser.close()


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "with_table", lambda runs, name: [])
    with pytest.raises(UserError, match="try: python train.py --diagnostics"):
        page.write_page(results.read_folder(Path("results/slips"))[:1], tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="pip install plotly"):
        page.write_page([], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
