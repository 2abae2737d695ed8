"""results.py, claims.py and plots.py: reading, choosing, statistics, verdicts, and what the figures draw."""

import json
import shutil

import numpy as np
import pytest

import claims
import plots
import results
from results import Run


def fake_run(folder, seed=0, final=0.5, steps=10, scale=1.0, **config):
    """A run's files with a made-up log: accuracy from 0.4 over 0.9 to `final`; log-ratios, norms and costs times `scale`."""
    defaults = {"format": results.FORMAT, "prompts": 8, "rollouts": 4, "ops": 1, "lr": 1e-3, "eval_temperature": 1.0}
    defaults |= {"eval_every": 5}
    method = {**dict.fromkeys(results.METHOD), "loss": "off_rl", "lam": 0.0}
    measured = {"shared_tokens": 0.8, "common_prefix": 0.4}
    config = {**defaults, **method, "steps": steps, "seed": seed, "measured": measured, **config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    columns = ["step", "accuracy", "accuracy_greedy", "loss", "grad_norm", "seconds", "tokens_trained", "tokens_sampled"]
    columns += [f"{name}_{kind}" for name in ("logratio", "pi", "pihat", "coefficient") for kind in ("correct", "incorrect")]
    columns += ["below_0.2_pi", "below_0.2_pihat"]
    lines = [",".join(columns)]
    for i, (step, accuracy) in enumerate(((0, 0.4), (steps // 2, 0.9), (steps, final))):
        values = [step, accuracy, 1 - 0.1 * i, "nan" if i == 0 else -0.1, i * scale, (1 + i) * scale, 100 * i, 50 * scale]
        values += [-i * scale, -10 * i * scale, 0.9, 0.8 - 0.1 * i, 0.9, 0.8 / (1 + i), 0.9, (0.8 - 0.2 * i) * scale]
        lines.append(",".join(map(str, [*values, 1000 * i, 5000 * i])))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


def add_extrapolation(folder, ratio, gain):
    """An extrapolation.csv whose π̂ is at t' = (1 + lam) t `ratio` times as far away, elsewhere much farther."""
    lines = ["t,later,lam,kl,tv,token_error,coefficient_error,coefficient_rank"]
    for t in (10, 20, 40, 80, 320, 480):
        for later in (2 * t, 3 * t, 4 * t):
            for lam in (0, 0.5, 1, 2, 5):
                hit = later == (1 + lam) * t
                factor = 1 if lam == 0 else ratio * (1 if t < 80 else 4 if t < 480 else 1e6) if hit else 1e6
                numbers = [0.1 * factor, 0.1 * factor, 0.1 * factor**2, 0.1 * factor**3]
                lines.append(",".join(map(str, [t, later, lam, *numbers, 0.5 if lam == 0 else 0.5 + gain if hit else -1])))
    (folder / "extrapolation.csv").write_text("\n".join(lines) + "\n")


FPA = {"loss": "fpa", "lam": 2.0, "target": "both"}


@pytest.mark.slow
def test_missing_and_half_written_logs_are_named(tmp_path, capsys):
    torn, whole = fake_run(tmp_path / "runs" / "a"), fake_run(tmp_path / "runs" / "b", seed=1)
    text = (torn / "log.csv").read_text()
    damages = [(text[:-3], "half-written"), (text[:-40], "half-written"), (text.split("\n10,")[0] + "\n", "step 5 of 10")]
    damages += [(text.replace(",accuracy,", ",precision,"), "no accuracy")]
    for damage, message in [*damages, ("", "half-written"), (None, "missing")]:
        (torn / "log.csv").unlink(missing_ok=True)
        if damage is not None:
            (torn / "log.csv").write_text(damage)
        plots.run([str(tmp_path / "runs"), "--to", str(tmp_path / "figures")])
        error = capsys.readouterr().err
        assert str(torn) in error and message in error and str(whole) not in error and error.count("\n") == 1
        assert (tmp_path / "figures" / "dynamics.png").exists() and (tmp_path / "figures" / "results.md").exists()


@pytest.mark.parametrize("version", [2, None, "3"])
def test_logs_of_another_version_are_one_line(version, tmp_path, capsys):
    fake_run(tmp_path / "runs" / "new")
    fake_run(tmp_path / "runs" / "old", seed=1, format=version)
    with pytest.raises(SystemExit) as stop:
        plots.run([str(tmp_path / "runs"), "--to", str(tmp_path / "figures")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "runs/old was written by another version" in error
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_no_runs_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        plots.run([str(tmp_path / folder), "--to", str(tmp_path / "figures")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(tmp_path / folder) in error
    assert not (tmp_path / "figures").exists()


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


# --- verdicts


@pytest.mark.parametrize(
    "values, side, bound, supported",
    [
        ([1, 2, 3], ">", -1, True),  # 2 ± 2.48
        ([1, 2, 3], ">", 0, False),
        ([1, 2, 3], "<", 5, True),
        ([1, 2, 3], "<", 4, False),
        ([0.5], ">", 0.4, True),
        ([0.5], ">", 0.5, False),
    ],
)
def test_a_number_is_supported_if_its_whole_interval_is(values, side, bound, supported):
    assert claims.Measured("x", np.array(values, dtype=float), side, bound).supports() == supported


def test_verdicts():
    yes, no, said = (claims.Measured("x", np.array([1.0, 1.0]), side, bound) for side, bound in ((">", 0), (">", 2), ("", 0)))
    once = claims.Measured("x", np.array([1.0]), ">")
    assert claims.verdict([once]) == "not run" and claims.verdict([once._replace(seeded=False)]) == "reproduced"
    assert claims.verdict([yes, yes, said]) == "reproduced" and claims.verdict([yes, no]) == "mixed"
    assert claims.verdict([no, said]) == "not reproduced"
    assert claims.verdict([yes, claims.Measured("x", np.array([]), ">")]) == "not run"
    assert str(claims.Measured("x", np.array([1.0, 2.0, 3.0]), ">", 0.5)) == "x: 2.00 ± 2.48 (claim: > 0.5)"
    assert str(claims.Measured("x", np.array([0.5]))) == "x: 0.500"


def test_differences_are_paired_by_seed(tmp_path):
    ours = [
        results.read_run(fake_run(tmp_path / f"f{seed}", seed, final, **FPA)) for seed, final in ((0, 0.8), (1, 0.5), (2, 0.1))
    ]
    theirs = [results.read_run(fake_run(tmp_path / f"o{seed}", seed, final)) for seed, final in ((1, 0.1), (0, 0.6))]
    assert claims.paired(ours, theirs, results.final).tolist() == pytest.approx([0.2, 0.4])


def test_every_claim_says_what_it_measures(tmp_path):
    """Made-up runs, in which every number of every claim can be worked out by hand."""
    runs = {
        "off_rl": (0.2, {}), "fpa": (0.8, {"scale": 0.5, **FPA}), "sft": (0.9, {"loss": "sft"}),
        "lam0.5": (0.5, {**FPA, "lam": 0.5}), "lam1": (0.6, {**FPA, "lam": 1.0}), "lam10": (0.7, {**FPA, "lam": 10.0}),
        "correct": (0.1, {**FPA, "target": "correct", "scale": 3}),
        "incorrect": (0.85, {**FPA, "target": "incorrect", "scale": 4}),
        "constant": (0.65, {"loss": "constant", "target": "incorrect", "weight": 0.4}),
        "sharpened": (0.75, {**FPA, "loss": "sharpened"}),
        "sharpened2": (0.7, {**FPA, "loss": "sharpened", "target": "incorrect"}),
        "long": (0.1, {"steps": 40}), "long fpa": (0.7, {"steps": 40, **FPA}),
        "slow": (0.3, {"lr": 5e-4, "scale": 0.6}), "slower": (0.4, {"lr": 1e-4, "scale": 0.1}), "faster": (0.0, {"lr": 1e-2}),
        "early": (0.5, {"lr": 2e-5, **FPA}), "middle": (0.5, {"lr": 2e-4, **FPA}),
        "few fpa": (0.3, {"prompts": 4, **FPA}), "few sft": (0.55, {"prompts": 4, "loss": "sft"}),
        "many fpa": (0.95, {"prompts": 64, **FPA}), "many sft": (0.9, {"prompts": 64, "loss": "sft"}),
    }  # fmt: skip
    for name in ("dpo", "rpo", "kto", "simper", "grpo"):  # final accuracies 0.31, 0.32, …, tuned at the main lr
        extra = {"loss": name, "dapo": False if name == "grpo" else None, "scale": 4 if name == "grpo" else 1}
        runs[name] = 0.3 + 0.01 * (1 + len(runs) - 22), extra
    for name in ("dpo", "rpo"):
        runs[f"{name} fpa"] = 0.6 if name == "dpo" else 0.2, {"loss": name, "lam": 2.0, "target": "both"}
    for name, scale in (("fpa", 0.25), ("grpo", 4)):
        runs[f"timed {name}"] = 0.5, {**runs[name][1], "scale": scale, "eval_every": 10}
    for seed in range(5):
        for name, (final, config) in runs.items():
            fake_run(tmp_path / f"{name}-{seed}", seed, final, **config)
        rows = "step,a,b,g,cosine,share_g_above_a\n0,1,2,-1,-0.2,0.1\n5,1,2,1,0.4,0.3\n10,1,2,1,0.7,0.5\n"
        (tmp_path / f"off_rl-{seed}" / "entanglement.csv").write_text(rows)
        add_extrapolation(tmp_path / f"early-{seed}", 0.5, 0.1)
        add_extrapolation(tmp_path / f"middle-{seed}", 2.0, 0.1)
    for seed in results.TUNING_SEEDS:
        for name in ("off_rl", "fpa", "sft", "dpo", "rpo", "kto", "simper", "grpo", "dpo fpa", "rpo fpa"):
            for lr, better in ((1e-3, 0.5), (1e-4, 0.4)):
                fake_run(tmp_path / f"{name}-{seed}-{lr}", seed, better, **{**runs[name][1], "lr": lr})
        worse = {**runs["dpo fpa"][1], "lam": 5.0}
        fake_run(tmp_path / f"worse-{seed}", seed, 0.3, **worse)
    for seed in range(5):  # would be better than λ = 2, but tuning did not choose it
        fake_run(tmp_path / f"worse-{seed}", seed, 0.99, **worse)
    runs = results.read_runs(results.run_folders(tmp_path))
    table = claims.claims(runs)
    bench = claims.memory_ratio().item()
    expected = {
        "C1": [(0.8, "> 0.5"), (0.4, "")],
        "C2": [(0.3, "> 0"), (-0.2, ""), (0.3, ""), (0.1, "")],
        "C3": [(-2, "< 0"), (-20, "")],
        "C4": [(1, "> 0"), (9 - 18, "> 0"), (9, "> 0")],
        "C5": [((1 + 0.4 / 0.7 + 0.8 / 1.8) / 3, "< 1"), (8, "> 0")],
        "C6": [(-0.3, "< 0"), (0.3, "> 0"), (0.8, ""), (0.2, ""), (-0.6, "< 0")],
        "C7": [(0.6, "> 0"), (0.49, "> 0"), (0.48, "> 0"), (0.47, "> 0"), (0.46, "> 0")],
        "C8": [(0.3, "> 0"), (0.4, "> 0"), (0.6, "> 0"), (-0.2, "> 0"), (-0.1, "> 0"), (0.1, "> 0")],
        "C9": [(0.65, "> 0"), (0.05, "> -0.05"), (-0.1, "< 0.05"), (2, ""), (6, ""), (8, "")],
        "C10": [(0.5, "< 1"), (2, "< 1"), (2, "< 1"), (8, "< 1"), (0.25, ""), (0.125, ""), (0.1, "")],
        "C11": [(0.29, "> 0"), (-0.12, "> 0")],
        "C12": [(0.5, "> 0"), (0.4, "> 0"), (-10 + 12, "")],
        "C13": [(0.5, "< 1.1"), (bench, "< 1.02")],
        "C14": [(0.45, "> -0.05"), (1 / 8, "< 0.5"), (1 / 16, "< 0.5"), (225 / 400, "")],
        "C15": [(0.2, "> 0"), (0.05, "> 0"), (0.15, "> 0"), (0.4, ""), (2, "")],
        "C16": [(-0.1, "> 0"), (-0.1, "> 0")],
        "C17": [(-0.25, "< 0"), (0.05, "> 0")],
    }
    assert list(table) == list(expected)
    for name, (_, measured, experiments) in table.items():
        got = [(m.values.mean().item(), f"{m.side} {m.bound:g}" if m.side else "") for m in measured]
        assert [side for _, side in got] == [side for _, side in expected[name]], name
        assert [mean for mean, _ in got] == pytest.approx([mean for mean, _ in expected[name]]), name
        assert set(experiments) <= set(claims.EXPERIMENTS)
    verdicts = {name: claims.verdict(measured) for name, (_, measured, _) in table.items()}
    mixed = {"C4", "C8", "C10", "C11", "C13"}
    assert {name for name, words in verdicts.items() if words == "mixed"} == mixed
    assert {name for name, words in verdicts.items() if words == "not reproduced"} == {"C16"}
    assert set(verdicts.values()) == {"reproduced", "mixed", "not reproduced"}
    text = claims.results(runs)
    assert "| C16: " in text and "final accuracy, FPA − SFT: -0.100 ± " in text and "**not reproduced**" in text
    assert "SimPER                          0.001, an end of the grid" in text


def test_claims_without_their_runs_are_not_run(tmp_path):
    for seed in range(2):
        fake_run(tmp_path / f"o{seed}", seed)
    fake_run(tmp_path / "f0", 0, **FPA)
    table = claims.claims(results.read_runs(results.run_folders(tmp_path)))
    verdicts = {name: claims.verdict(measured) for name, (_, measured, _) in table.items()}
    assert {name for name, words in verdicts.items() if words != "not run"} == {"C1", "C3"}  # what Off-RL alone answers


# --- figures


@pytest.mark.slow
def test_every_figure_is_drawn_where_its_runs_are_there(tmp_path, capsys):
    control, count = {"target": "incorrect", "weight": 0.25}, 0
    methods = [
        {}, FPA, {**FPA, "lam": 5.0}, {**FPA, "target": "correct"}, {**FPA, "target": "incorrect"}, {"loss": "sft"},
        {"loss": "constant", **control}, {**FPA, "loss": "sharpened"}, {"loss": "grpo", "dapo": False},
    ]  # fmt: skip
    for seed in (0, 1):
        for method in [*methods, {"prompts": 16}, {**FPA, "prompts": 16}, {**FPA, "lr": 1e-4}, {"steps": 20}]:
            folder = fake_run(tmp_path / "runs" / str(count), seed, 0.5 + 0.1 * seed, **method)
            count += 1
            header, row = "step,a,b,g,cosine,share_g_above_a\n", "1,2,-1,-0.1,0.5\n"
            (folder / "entanglement.csv").write_text(f"{header}0,{row}5,{row}10,{row}")
            add_extrapolation(folder, 0.5, 0.1)
            lines = [f"{step},0,{side},1,1 2 18,0.1 -1 0" for step in (0, 5, 10) for side in ("correct", "incorrect")]
            (folder / "tokens.csv").write_text("\n".join(["step,pair,side,first_wrong,tokens,logratios", *lines]) + "\n")
    plots.run([str(tmp_path / "runs"), "--to", str(tmp_path / "figures")])
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == set(plots.FIGURES) and "2 seeds" in capsys.readouterr().out

    runs = results.read_runs(results.run_folders(tmp_path / "runs"))
    axes = {name: function(runs)[0].axes for name, function in plots.FIGURES.items()}
    first, rows = axes["forecast"], [("KL", 0.5), ("Coefficients", 0.125), ("Rank correlation of coefficients", 0.1)]
    for title, height in rows:  # at t' = (1 + lam) t, for t of 20
        (axis,) = [axis for axis in first if axis.get_title() == title]
        assert [line.get_ydata()[1] for line in axis.lines if len(line.get_xdata()) == 6][0] == pytest.approx(height)
    for axis, height in zip(axes["extrapolation"], (0.5, 0.5, 2)):  # t of 20, 40, 80; rings where the test file has its hits
        rings = [line for line in axis.lines if line.get_markersize() == 11]
        assert {(line.get_xdata()[0], round(line.get_ydata()[0], 6)) for line in rings} == {(2, height), (3, height)}
    grid = axes["extrapolation_map"][0].collections[0].get_array()
    assert (
        grid[1, 0] == pytest.approx(-1) and grid[2, 1] == pytest.approx(-1) and grid[1, 1] > 4
    )  # log2; rows are lam of 0.5, 1, 2
    (patch,) = axes["tokens"][1].patches
    assert (patch.get_x(), patch.get_width()) == (0.5, 1) and not axes["tokens"][
        0
    ].patches  # around token 1, incorrect side only
    curves = [container for container in axes["prompts"][0].containers if container.get_label() == "Off-RL"]
    assert curves[0].lines[0].get_xdata().tolist() == [8, 16] and curves[0].lines[0].get_ydata() == pytest.approx([0.55, 0.55])
    assert axes["lambda"][0].containers[0].lines[0].get_ydata() == pytest.approx([0.55] * 3)  # λ of 0, 2 and 5
    tokens, sampled = ([line.get_xdata()[-1] for line in axis.lines][0] for axis in axes["cost"][:2])
    assert tokens == pytest.approx(250 / 1e6) and sampled == pytest.approx(50 / 1e6)
    plots.plt.close("all")


def lines_of(panel, methods):
    _, axis = plots.plt.subplots()
    panel(axis, methods)
    drawn = [(line.get_color(), line.get_linestyle(), list(line.get_ydata())) for line in axis.lines]
    plots.plt.close("all")
    return drawn


def test_panels_draw_the_columns_they_name(tmp_path):
    assert "hat" in plots.PIHAT and "hat" not in plots.PI
    runs = [results.read_run(fake_run(tmp_path / "f", **FPA))]
    methods, log, colour = results.by_method(runs), runs[0].log, plots.COLOURS["fpa"]
    assert (colour, "-", log["accuracy"].tolist()) in lines_of(plots.panel_accuracy, methods)
    for kind, style in plots.CORRECTNESS.items():
        assert (colour, style, log[f"logratio_{kind}"].tolist()) in lines_of(plots.panel_logratios, methods)
        assert (colour, style, log[f"coefficient_{kind}"].tolist()) in lines_of(plots.panel_coefficient, methods)
    ratio = (log["pihat_incorrect"] / log["pi_incorrect"]).tolist()
    assert (colour, "--", ratio) in lines_of(plots.panel_ratio, methods)
    assert (colour, ":", (log["below_0.2_pihat"] / 1000).tolist()) in lines_of(plots.panel_below, methods)
    assert (colour, "-", log["grad_norm"].tolist()) in lines_of(plots.panel_grad_norm, methods)


def test_colours_are_of_their_own(tmp_path):
    runs = [results.read_run(fake_run(tmp_path / str(lam), **{**FPA, "lam": lam})) for lam in (1.0, 2.0, 5.0)]
    colours = [colour for colour, _, _ in plots.coloured(results.by_method(runs))]
    assert len(set(colours)) == 3 and colours[0] == plots.COLOURS["fpa"]


def test_labels():
    def named(**values):
        return results.label(tuple({**dict.fromkeys(results.METHOD), "lam": 0.0, **values}[name] for name in results.METHOD))

    assert named(loss="off_rl") == "Off-RL" and named(**{**FPA, "target": "incorrect"}) == "FPA, λ = 2, incorrect only"
    assert named(loss="dpo", beta=0.1) == "DPO" and named(loss="dpo", lam=2.0, target="both") == "DPO with FPA, λ = 2"
    assert named(loss="grpo", dapo=True) == "GRPO (DAPO)" and named(loss="pessimistic", shift=0.5) == "pessimistic, 0.5"


def test_a_folder_of_figures_that_cannot_be_written(tmp_path, capsys):
    fake_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        plots.run([str(tmp_path / "runs"), "--to", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--to" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_a_copy_of_a_run_keeps_its_fingerprint(tmp_path):
    first = results.read_run(fake_run(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = results.read_run(tmp_path / "b")
    assert plots.fingerprint([first]) == plots.fingerprint([second])
    changed = Run(second.folder, second.config, {**second.log, "accuracy": second.log["accuracy"] + 0.001})
    assert plots.fingerprint([first]) != plots.fingerprint([changed])
