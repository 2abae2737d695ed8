"""report.html: the runs of a folder to explore in a browser, in one file that needs no server and no network.

    python -m study.page         # results/slips -> results/slips/figures/report.html; `pip install plotly` first
    python -m study.page runs    # the runs below runs/ -> runs/figures/report.html

The page has a token heat map of one pair of rollouts, the curves, and the claims table. The pair is the one near the 10th
percentile of the drag, as in the figure of tokens. A slider chooses the training step, and a list the loss and λ. A run is
drawn in its loss's colour, as in the figures. Plotly draws, and is part of the file.
"""

import html
import json
from pathlib import Path

import numpy as np

from plumbing.files import UserError, printable_path, write_text
from plumbing.flags import command, command_line
from study import claims
from study.drawing import HIT, colour_of, pair_at
from study.results import by_method, label, main_runs, read_folder, where, with_table
from toy_math.tokenizer import ALPHABET

CURVES = ("accuracy", "logratio_correct", "logratio_incorrect", "pi_incorrect", "pihat_incorrect")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Future Policy Approximation: tokens, curves, claims</title>
<style>
body { font-family: system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 0.5rem 1rem; color: #222 }
.controls { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: center; position: sticky; top: 0; z-index: 2;
            background: #fff; padding: 0.5rem 0; border-bottom: 1px solid #bbb }
.controls label { display: flex; gap: 0.5rem; align-items: center }
input[type=range] { width: min(24rem, 55vw) }
select, input { font-size: 1rem; min-height: 2rem }
.wide { overflow-x: auto }
#heat { min-width: 52rem }
table { border-collapse: collapse; font-size: 0.9rem }
td, th { border-top: 1px solid #ccc; padding: 0.4rem; text-align: left; vertical-align: top }
</style></head><body>
<h1>What training does to single tokens</h1>
<div class="controls">
<label>run <select id="run"></select></label>
<label>step <input id="step" type="range" min="0" value="0" aria-describedby="at"> <output id="at"></output></label>
</div>
<p id="problem"></p>
<div class="wide"><div id="heat"></div></div>
<p>Colour: the token's log-ratio to the reference policy in nats, cut at ±4; the box is the first wrong token. Hover over a
token, or touch it, for its probabilities: π is the policy's, π̂ the future policy's at the run's λ, π_ref the reference's.</p>
<div id="curves"></div>
<h2>Claims</h2>
<div class="wide">CLAIMS</div>
<script>PLOTLY</script>
<script>
const runs = RUNS;
const chosen = document.getElementById("run"), slider = document.getElementById("step");
runs.forEach((run, i) => chosen.add(new Option(run.label, i)));
const same = { displaylogo: false, responsive: true };
function draw() {
  const run = runs[chosen.value];
  slider.max = run.steps.length - 1;
  const i = Math.min(slider.value, slider.max), step = run.steps[i], sides = ["correct", "incorrect"];
  document.getElementById("at").textContent = step + " of " + run.steps[run.steps.length - 1];
  slider.setAttribute("aria-valuetext", "step " + step);
  document.getElementById("problem").textContent = "Two rollouts of " + run.problem;
  const tokens = sides.map(side => run.tokens[side]), at = sides.map(side => run.frames[i][side]);
  const p = x => Math.exp(x).toPrecision(3);
  const custom = at.map((frame, s) => frame.ratios.map((ratio, t) =>
    [p(run.ref[sides[s]][t] + ratio), p(frame.future[t]), p(run.ref[sides[s]][t])]));
  Plotly.react("heat", [{
    type: "heatmap", z: at.map(frame => frame.ratios), y: sides, text: tokens, texttemplate: "%{text}", customdata: custom,
    hovertemplate: "token %{text}<br>log-ratio %{z:.3f}<br>π %{customdata[0]}<br>π̂ %{customdata[1]}<br>π_ref %{customdata[2]}" +
      "<extra></extra>",
    colorscale: [[0, "#b2182b"], [0.5, "#f7f7f7"], [1, "#2166ac"]], zmin: -4, zmax: 4, xgap: 1, ygap: 6,
    colorbar: { title: { text: "nats" } } }],
    { height: 230, margin: { l: 80, r: 10, t: 20, b: 30 },
      yaxis: { autorange: "reversed" }, xaxis: { title: { text: "token" } },
      shapes: [{ type: "rect", x0: run.first - 0.5, x1: run.first + 0.5, y0: 0.5, y1: 1.5,
        line: { color: "#000", width: 3 } }]
    },
    same);
  const line = (name, label, axis, dash) => ({ x: run.curve_steps, y: run.curves[name], name: label, yaxis: axis,
    mode: "lines", line: { color: run.colour, dash: dash, width: 2.5 } });
  Plotly.react("curves", [
    line("accuracy", "above: pass@1", "y", "solid"),
    line("pi_incorrect", "π̄ of incorrect", "y", "dash"),
    line("pihat_incorrect", "future π̄ of incorrect", "y", "dot"),
    line("logratio_correct", "below: log-ratio of correct", "y2", "solid"),
    line("logratio_incorrect", "of incorrect", "y2", "dash")],
    { height: 560, margin: { l: 60, r: 20, t: 20, b: 40 }, legend: { orientation: "h", y: -0.12 }, showlegend: true,
      xaxis: { title: { text: "training step" }, range: [0, run.curve_steps[run.curve_steps.length - 1]], anchor: "y2" },
      yaxis: { title: { text: "pass@1, probability" }, range: [0, 1.02], domain: [0.54, 1] },
      yaxis2: { title: { text: "log-ratio [nats]" }, domain: [0, 0.46] },
      shapes: [{ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color: "#555", dash: "dot" } }] },
    same);
}
chosen.addEventListener("change", draw);
slider.addEventListener("input", draw);
draw();
</script></body></html>
"""


def numbers(text):
    return [float(number) for number in text.split()]


def run_data(run, pair):
    """What the page shows of one run: the tokens of a pair at every evaluation, and its curves."""
    table = run.tables["tokens"]
    at = {side: np.flatnonzero((table["pair"] == pair) & (table["side"] == side)) for side in ("correct", "incorrect")}
    characters = ALPHABET + "▪▪▪"  # ▪: EOS
    columns = {"ratios": "logratios", "future": "future_logps"}
    frames = [
        {side: {key: numbers(table[name][rows[i]]) for key, name in columns.items()} for side, rows in at.items()}
        for i in range(len(at["correct"]))
    ]
    return {
        "label": label(run.method),
        "colour": colour_of(run.config["loss"]),
        "problem": f"one problem of seed {run.config['seed']}, each token a column: the pair near the 10th "
        "percentile of the correct rollouts' log-ratios under the first run at its last step",
        "steps": table["step"][at["correct"]].astype(int).tolist(),
        "first": int(table["first_wrong"][at["correct"][0]]),
        "tokens": {s: [characters[int(token)] for token in table["tokens"][rows[0]].split()] for s, rows in at.items()},
        "ref": {s: numbers(table["ref_logps"][rows[0]]) for s, rows in at.items()},
        "frames": frames,
        "curve_steps": run.log["step"].astype(int).tolist(),
        "curves": {name: [None if np.isnan(x) else float(f"{x:.4g}") for x in run.log[name]] for name in CURVES},
    }


def claims_table(runs):
    """The claims table as HTML."""
    rows = []
    for name, (text, measured, _) in claims.claims(runs).items():
        verdict = claims.verdict(measured)
        values = "" if verdict == "not run" else "<br>".join(html.escape(str(number)) for number in measured)
        rows.append(f"<tr><td>{name}: {html.escape(text)}</td><td>{values}</td><td><strong>{verdict}</strong></td></tr>")
    head = "<tr><th>claim</th><th>measured: mean over seeds ± 95 % interval</th><th>verdict</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def write_page(runs, path):
    """Write the page. Raises UserError where plotly or runs with single tokens are missing, or the disk is full."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the page needs plotly: pip install plotly") from None
    shown = [run for run in with_table(main_runs(runs), "tokens") if "ref_logps" in run.tables["tokens"]]
    if not shown:
        raise UserError("the page needs runs with their single tokens; try: python train.py --diagnostics")
    first = [some[0] for some in by_method(where(shown, seed=shown[0].config["seed"])).values()]  # which share their pairs
    pair = pair_at(HIT, first[0].tables["tokens"])  # by the first method
    data = json.dumps([run_data(run, pair) for run in first], ensure_ascii=False).replace("</", "<\\/")
    page = PAGE.replace("RUNS", data, 1).replace("CLAIMS", claims_table(runs), 1).replace("PLOTLY", get_plotlyjs(), 1)
    write_text(path, page)


# --- the command


def run(argv=None):
    """The command: write report.html, or one line on stderr and exit code 2."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.page")
    parser.add_argument("folder", nargs="?", default=Path("results/slips"), type=printable_path,
        help="folder of tables or of runs")  # fmt: skip
    args = parser.parse_args(argv)
    path = args.folder / "figures" / "report.html"
    with command(parser.prog, f"{path} is whole, and may be of before", path):
        runs = read_folder(args.folder)
        path.parent.mkdir(exist_ok=True)
        write_page(runs, path)
        print(f"page          {path}")


if __name__ == "__main__":
    run()
