"""plots.py and what it stands on: reading and choosing runs, means and intervals, labels, and the curves of the method."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import refusal

import plots
from study import drawing, results


def fake_run(folder, seed=0, final=0.5, steps=10, scale=1.0, **config):
    """A run's files with a made-up log: accuracy from 0.4 over 0.9 to `final`; log-ratios, norms and costs times `scale`."""
    defaults = {"format": results.FORMAT, "prompts": 8, "rollouts": 4, "ops": 1, "task": "habit", "lr": 1e-3}
    defaults |= {"eval_every": 5, "loss": "off_rl", "measured": {"shared_tokens": 0.8, "common_prefix": 0.4}}
    config = {**defaults, "steps": steps, "seed": seed, **config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    columns = ["step", "accuracy", "accuracy_greedy", "loss", "grad_norm", "seconds", "tokens_trained", "tokens_sampled"]
    columns += ["accuracy_0.7", "test_accuracy"]
    columns += [f"{name}_{kind}" for name in ("logratio", "pi", "pihat", "coefficient") for kind in ("correct", "incorrect")]
    columns += ["below_0.2_pi", "below_0.2_pihat", "logratio_correct_below_0"]
    columns += [f"logratio_correct_p{percent}" for percent in (5, 25, 50, 75, 95)]
    lines = [",".join(columns)]
    for i, (step, accuracy) in enumerate(((0, 0.4), (steps // 2, 0.9), (steps, final))):
        values = [step, accuracy, 1 - 0.1 * i, "nan" if i == 0 else -0.1, i * scale, (1 + i) * scale, 100 * i, 50 * scale]
        values += [accuracy + 0.05, "nan" if step == steps // 2 else accuracy - 0.02]
        values += [-i * scale, -10 * i * scale, 0.9, 0.8 - 0.1 * i, 0.9, 0.8 / (1 + i), 0.9, (0.8 - 0.2 * i) * scale]
        values += [1000 * i, 5000 * i, 0.2 * i, *(-i * scale * part for part in (20, 3, 1, 0.5, -1))]
        lines.append(",".join(map(str, values)))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


FPA = {"loss": "fpa", "lam": 2.0, "target": "both"}


def test_missing_and_half_written_logs_are_named(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_figures", lambda runs, to: drawn.append(runs))
    torn, whole = fake_run(tmp_path / "runs" / "a"), fake_run(tmp_path / "runs" / "b", seed=1)
    text = (torn / "log.csv").read_text()
    damages = [(text[:-3], "half-written"), (text[:-40], "half-written"), (text.split("\n10,")[0] + "\n", "step 5 of 10")]
    damages += [
        (text.replace(",accuracy,", ",precision,"), "no accuracy"),
        (text.replace("\n5,", "\nx,"), "step is not a number"),
    ]
    for damage, message in [*damages, ("", "half-written"), (None, "missing")]:
        (torn / "log.csv").unlink(missing_ok=True)
        if damage is not None:
            (torn / "log.csv").write_text(damage)
        plots.run([str(tmp_path / "runs")])
        error = capsys.readouterr().err
        assert str(torn) in error and message in error and str(whole) not in error and error.count("\n") == 1
        assert [run.folder for run in drawn.pop()] == [whole]


@pytest.mark.parametrize("version", [2, None, "3"])
def test_logs_of_another_version_are_one_line(version, tmp_path, capsys):
    fake_run(tmp_path / "runs" / "new")
    fake_run(tmp_path / "runs" / "old", seed=1, format=version)
    code, error = refusal(plots.run, [tmp_path / "runs", "--to", tmp_path / "figures"], capsys)
    assert code == 2 and error.count("\n") == 1 and "runs/old was written by another version" in error
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_no_runs_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, error = refusal(plots.run, [tmp_path / folder, "--to", tmp_path / "figures"], capsys)
    assert code == 2 and error.count("\n") == 1 and str(tmp_path / folder) in error
    assert not (tmp_path / "figures").exists()


def test_a_name_that_is_too_long_is_one_line(tmp_path, capsys):
    code, error = refusal(plots.run, [tmp_path / ("a" * 300)], capsys)
    assert code == 2 and error.count("\n") == 1 and "is not a folder" in error


def test_a_seed_counts_once(tmp_path, capsys):
    fake_run(tmp_path / "a", **FPA)
    fake_run(tmp_path / "b", **FPA)
    runs = results.read_runs(results.run_folders(tmp_path))
    assert [run.folder.name for run in runs] == ["a"] and f"left out {tmp_path / 'b'}" in capsys.readouterr().err


def test_choosing_runs(tmp_path):
    for name, config in {
        "a": {},
        "b": FPA,
        "c": {**FPA, "lr": 1e-4},
        "d": {"lr": 1e-4, "steps": 20},
        "tuning": {"seed": 1000, "loss": "dpo"},
        "e": {"seed": 1},
        "few": {"prompts": 4},
    }.items():
        fake_run(tmp_path / name, **config)
    runs = results.read_runs(results.run_folders(tmp_path))
    assert [run.folder.name for run in runs] == ["a", "e", "b", "tuning", "c", "few", "d"]
    assert [run.folder.name for run in results.main_runs(runs)] == ["a", "e", "b"]
    assert [run.folder.name for run in results.varying(runs, "lr")] == ["a", "e", "b", "c"]
    assert [run.folder.name for run in results.varying(runs, "lr", "steps")] == ["a", "e", "b", "c", "d"]
    assert [run.folder.name for run in results.where(runs, loss=("fpa", "dpo"), lr=1e-3)] == ["b", "tuning"]
    assert list(results.by_method(results.main_runs(runs))) == [runs[0].method, runs[2].method]


def test_tuning_takes_the_best_lr_of_its_own_seeds_alone(tmp_path):
    for seed in (1000, 1001, 0, 1):
        for lr, final in ((1e-4, 0.6), (1e-3, 0.5)):
            good = final if seed >= 1000 else 1 - final  # on the reported seeds the other one would win
            fake_run(tmp_path / f"{seed}-{lr}", seed=seed, final=good, lr=lr)
    fake_run(tmp_path / "untuned", **FPA)
    runs = results.read_runs(results.run_folders(tmp_path))
    assert results.best_settings(runs) == {("off_rl", False): (runs[0].method, 1e-4)}
    chosen = results.tuned(runs)["off_rl", False]
    assert [(run.config["seed"], run.config["lr"]) for run in chosen] == [(0, 1e-4), (1, 1e-4)]


def test_mean_and_interval_by_hand():
    mean, half = results.mean_and_interval([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert mean.tolist() == [2.0, 5.0]
    assert half.tolist() == pytest.approx([4.303 * 1.0 / 3**0.5, 0.0])  # t of 2 degrees of freedom, deviation 1


def test_the_summary_says_mean_interval_and_seeds(tmp_path):
    for seed, final in ((0, 0.2), (1, 0.4)):
        fake_run(tmp_path / str(seed), seed=seed, final=final)
    fake_run(tmp_path / "fpa", final=0.7, **FPA)
    lines = results.summary(results.read_runs(results.run_folders(tmp_path))).splitlines()
    half = 12.706 * 0.1
    assert lines[2].split() == f"Off-RL 2 0.400 ± 0.000 0.900 ± 0.000 0.300 ± {half:.3f} 1.000 ± 0.000 0.800 ± 0.000".split()
    assert lines[3].split() == "FPA, λ = 2 1 0.400 0.900 0.700 1.000 0.800".split()


# --- labels and figures


def lines_of(panel, methods):
    _, axis = drawing.plt.subplots()
    panel(axis, methods)
    drawn = [(line.get_color(), line.get_linestyle(), list(line.get_ydata())) for line in axis.lines]
    drawing.plt.close("all")
    return drawn


def test_panels_draw_the_columns_they_name(tmp_path):
    assert plots.PIHAT == f"future {plots.PI}"
    runs = [results.read_run(fake_run(tmp_path / "f", **FPA))]
    methods, log, colour = results.by_method(runs), runs[0].log, drawing.colour_of("fpa")
    assert (colour, "-", log["accuracy"].tolist()) in lines_of(plots.panel_accuracy, methods)
    for kind, logratio, coefficient in zip(("correct", "incorrect"), plots.LOGRATIOS, plots.COEFFICIENTS):
        assert (colour, "-", log[f"logratio_{kind}"].tolist()) in lines_of(logratio, methods)
        assert (colour, "-", log[f"coefficient_{kind}"].tolist()) in lines_of(coefficient, methods)
    ratio = (log["pihat_incorrect"] / log["pi_incorrect"]).tolist()
    assert (colour, "-", ratio) in lines_of(plots.panel_ratio, methods)
    assert (colour, ":", log["below_0.2_pihat"].tolist()) in lines_of(plots.panel_below, methods)
    assert (colour, "-", log["below_0.2_pi"].tolist()) in lines_of(plots.panel_below, methods)
    assert (colour, "-", log["grad_norm"].tolist()) in lines_of(plots.panel_grad_norm, methods)


def test_colours_are_of_their_own(tmp_path):
    runs = [results.read_run(fake_run(tmp_path / str(lam), **{**FPA, "lam": lam})) for lam in (1.0, 2.0, 5.0)]
    colours = [colour for colour, _, _ in plots.coloured(results.by_method(runs))]
    assert len(set(colours)) == 3 and colours[0] == drawing.colour_of("fpa")


def named(**values):
    return results.label(tuple(values.get(name) for name in results.METHOD))


def test_labels():
    assert named(loss="off_rl") == "Off-RL" and named(**{**FPA, "target": "incorrect"}) == "FPA, λ = 2, incorrect only"
    assert named(loss="dpo", beta=0.1) == "DPO" and named(loss="dpo", lam=2.0, target="both") == "DPO with FPA, λ = 2"
    assert named(loss="grpo", dapo=False) == "GRPO" and named(loss="grpo", dapo=True) == "GRPO (DAPO)"
    assert named(loss="pessimistic", beta=0.1, shift=0.5) == "pessimistic, shift = 0.5"
    assert named(loss="rpo", beta=0.2, alpha=0.0) == "RPO, β = 0.2, α = 0" and named(loss="a_star_po", beta=1e-3) == "A*-PO"
    assert named(loss="sharpened", lam=2.0, target="both") == "sharpened, λ = 2"


def test_a_new_loss_and_its_hyperparameter_are_known_from_its_row(tmp_path, monkeypatch):
    """Its label, its method and its colour. The runs of the other losses stay what they are."""
    old = results.read_run(fake_run(tmp_path / "old", **FPA))
    row = SimpleNamespace(label="New", has_fpa_form=False, form_of=None, defaults={"gamma": 1.0})
    monkeypatch.setitem(results.LOSSES, "new", row)
    monkeypatch.setitem(results.HYPERPARAMETERS, "gamma", SimpleNamespace(symbol="γ"))
    monkeypatch.setattr(results, "METHOD", ("loss", *results.HYPERPARAMETERS))
    monkeypatch.setattr(results, "NOT_A_SETTING", (*results.NOT_A_SETTING, "gamma"))
    ours, other = (results.read_run(fake_run(tmp_path / str(x), loss="new", gamma=x)) for x in (1.0, 2.0))
    assert results.label(ours.method) == "New" and results.label(other.method) == "New, γ = 2"
    assert ours.method != other.method and ours.setting == other.setting == old.setting
    assert results.label(old.method) == "FPA, λ = 2" and results.read_run(old.folder).config == old.config
    assert drawing.colour_of("new") not in {drawing.colour_of(loss) for loss in results.LOSSES if loss != "new"}


def test_nulls_of_older_runs_are_absent_settings(tmp_path):
    old = results.read_run(fake_run(tmp_path / "old", lam=0.0, target=None, beta=None))
    new = results.read_run(fake_run(tmp_path / "new"))
    assert old.method == new.method and results.where([old, new], lam=0.0, target=None) == [old, new]


def test_a_folder_of_figures_that_cannot_be_written(tmp_path, capsys):
    fake_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("kept")
    code, error = refusal(plots.run, [tmp_path / "runs", "--to", tmp_path / "file"], capsys)
    assert code == 2 and "--to" in error and str(tmp_path / "file") in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_a_copy_of_a_run_keeps_its_fingerprint(tmp_path):
    first = results.read_run(fake_run(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = results.read_run(tmp_path / "b")
    assert drawing.fingerprint([first]) == drawing.fingerprint([second])
    changed = second._replace(log={**second.log, "accuracy": second.log["accuracy"] + 0.001})
    assert drawing.fingerprint([first]) != drawing.fingerprint([changed])
    tables = [first._replace(tables={"batch": {"up": np.array([up])}}) for up in (1.0, 1.0, 2.0)]
    one, same, other = (drawing.fingerprint([run]) for run in tables)
    assert one == same != other


def test_a_band_is_the_95_percent_interval(tmp_path):
    runs = [results.read_run(fake_run(tmp_path / str(seed), seed, end)) for seed, end in ((0, 0.2), (1, 0.4))]
    _, axis = drawing.plt.subplots()
    drawing.draw(axis, runs, lambda log: log["accuracy"], "red")
    edges = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.3 - 12.706 * 0.1, 0.3 + 12.706 * 0.1))
    drawing.plt.close("all")


# --- the command


def test_figures_go_into_the_folder_of_the_runs(tmp_path, capsys):
    """Where train.py writes them too, and nowhere else."""
    for seed in (0, 1):
        fake_run(tmp_path / "runs" / f"a{seed}", seed)
        fake_run(tmp_path / "runs" / f"b{seed}", seed, **FPA)
    plots.run([str(tmp_path / "runs")])
    figures = {path.stem for path in (tmp_path / "runs" / "figures").iterdir()}
    assert {"drag", "dynamics"} <= figures <= set(plots.FIGURES) and next(iter(plots.FIGURES)) == "drag"
    assert "FPA, λ = 2" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_figures_of_the_method_are_drawn_from_their_runs(tmp_path):
    for seed in (0, 1):
        for number, method in enumerate(
            [
                {},
                FPA,
                {**FPA, "lam": 5.0},
                {**FPA, "target": "correct"},
                {**FPA, "target": "incorrect"},
                {"steps": 20},
                {**FPA, "steps": 20},
                {"steps": 30},
            ]
        ):
            fake_run(tmp_path / f"{number}-{seed}", seed, 0.5 + 0.1 * seed, **method)
    runs = results.read_folder(tmp_path)
    figures = {name: plots.FIGURES[name](runs) for name in ("dynamics", "prolonged", "targets", "lambda")}
    axes = {name: figure.axes for name, (figure, _) in figures.items()}
    dots = [bar.lines[0].get_ydata()[0] for bar in axes["lambda"][0].containers]
    assert dots == pytest.approx([0.55] * 3)  # λ of 0, 2 and 5
    final, half = results.mean_and_interval([0.5, 0.6])
    bars = [container.lines[2][0].get_segments()[0][:, 1] for container in axes["lambda"][0].containers]
    assert np.allclose(bars, [final - half, final + half]) and len(bars) == 3
    best = [bar.lines[0].get_ydata()[0] for bar in axes["lambda"][1].containers]
    assert best == pytest.approx([max(run.log["accuracy"]) for run in figures["lambda"][1][:1]] * 3)
    assert {run.config["steps"] for run in figures["prolonged"][1]} == {20}
    assert {run.get("target") for run in figures["targets"][1]} == {None, "both", "correct", "incorrect"}
    assert len(results.by_method(figures["dynamics"][1])) == 5
    off_rl, fpa = (drawing.colour_of(loss) for loss in ("off_rl", "fpa"))
    means = [container.lines[0].get_color() for container in axes["lambda"][0].containers]
    assert means == [off_rl, fpa, fpa]  # λ = 0 is Off-RL, in its own colour
    for figure, _ in figures.values():
        check_hygiene(figure)
    drawing.plt.close("all")


def check_hygiene(figure):
    """A legend or what stands for it, at most seven curves in a panel, scales that are said, and no label cut off."""
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    names = [axis for axis in figure.axes if any("Off-RL" in text.get_text() for text in axis.get_yticklabels())]
    assert figure.legends or bars or names or any(axis.get_legend() for axis in figure.axes)
    for axis in figure.axes:
        axis.title.set_fontsize(10)  # as `draw_all` does
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for axis in figure.axes:
        curves = [line for line in axis.lines if len(line.get_xdata()) > 2 and line.get_linestyle() != "None"]
        assert len(curves) <= drawing.MOST_LINES
        if axis.get_yscale() in ("symlog", "log") and axis.get_ylabel():
            assert axis.get_yscale() in axis.get_ylabel(), axis.get_title()
        low, high = sorted(axis.get_ylim())
        ticks = [text for at, text in zip(axis.get_yticks(), axis.get_yticklabels()) if low <= at <= high]
        for text in [axis.xaxis.label, axis.yaxis.label, axis.title, *ticks]:
            box = text.get_window_extent()
            if text.get_text() and axis.get_visible():
                assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1, text


def test_a_caption_says_how_to_read_its_figure():
    """It is the docstring's first paragraph, of sentences that fit into three lines of the picture."""
    for name, function in plots.FIGURES.items():
        text = drawing.caption(function)
        assert text[-1] == "." and 60 < len(text) < 300 and "\n" not in text and "  " not in text, name


def test_few_never_shows_more_methods_than_asked(tmp_path):
    for lam in range(1, 10):
        fake_run(tmp_path / str(lam), loss="dpo", lam=float(lam), target="both")
    dpo = results.read_runs(results.run_folders(tmp_path))
    assert len(results.by_method(drawing.few(dpo))) == 6 and len(drawing.few(dpo, most=2)) == 2
    fake_run(tmp_path / "fpa", **FPA)
    both = results.read_runs(results.run_folders(tmp_path))
    assert [run.config["loss"] for run in drawing.few(both)] == ["fpa"]


def test_pairs_are_chosen_by_their_drag():
    """By the correct trace's sum at the last step alone: of sixteen pairs the second and the ninth, of two both."""
    rows = [(step, pair, side) for step in (0, 9) for pair in range(16) for side in ("correct", "incorrect")]
    order = [7, 3, 12, 0, 15, 9, 4, 11, 1, 14, 6, 2, 13, 8, 5, 10]  # the pair dragged down most first

    def text(step, pair, side):
        value = order.index(pair) - 8.0 if step == 9 and side == "correct" else -100.0 * pair
        return f"{value} 0.25 -0.25"

    table = {name: np.array([row[i] for row in rows]) for i, name in enumerate(("step", "pair", "side"))}
    table["logratios"] = np.array([text(*row) for row in rows])
    assert list(drawing.by_drag(table)) == order and drawing.by_drag(table)[7] == -8
    assert (drawing.pair_at(drawing.HIT, table), drawing.pair_at(drawing.MEDIAN, table)) == (3, 1)
    old = {name: column[table["pair"] < 2] for name, column in table.items()}
    assert (drawing.pair_at(drawing.HIT, old), drawing.pair_at(drawing.MEDIAN, old)) == (0, 1)


def test_the_spread_of_the_correct_answers_is_drawn(tmp_path):
    for seed, scale in ((0, 1.0), (1, 2.0)):
        fake_run(tmp_path / f"o{seed}", seed, scale=scale)
        fake_run(tmp_path / f"f{seed}", seed, scale=scale / 2, **FPA)
    runs = results.read_runs(results.run_folders(tmp_path))
    figure, chosen = plots.figure_drag(runs)
    left, off_rl, fpa = figure.axes
    assert len(chosen) == 4
    assert off_rl.get_title() == "Off-RL: 40 % of answers\nend below 0, 5 % below -60 nats"
    wide, narrow = (band.get_paths()[0].vertices[:, 1] for band in off_rl.collections)
    assert (wide.min(), narrow.min()) == (-60, -9)  # means over the seeds at the last step, of 20 and 3 times 2 scales
    assert off_rl.lines[0].get_ydata().tolist() == [0, -1.5, -3] and fpa.lines[0].get_ydata().tolist() == [0, -0.75, -1.5]
    assert off_rl.get_ylim() == fpa.get_ylim() and off_rl.get_yscale() == fpa.get_yscale() == "symlog"
    accuracy = {
        (line.get_color(), line.get_linestyle(), line.get_ydata()[-1]) for line in left.lines if len(line.get_xdata()) > 2
    }
    assert (drawing.colour_of("fpa"), ":", 0.55) in accuracy and len(accuracy) == 4
    assert left.get_title() == "Accuracy on validation problems"
    check_hygiene(figure)
    assert plots.figure_drag([runs[0]._replace(log={"accuracy": runs[0].log["accuracy"]})]) is None
    drawing.plt.close(figure)
