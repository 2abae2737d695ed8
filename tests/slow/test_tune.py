"""study/tune.py: the search on scores that are made up, and the whole command on a tiny world."""

import shutil

import pytest
from test_train import TINY, refusal

from study import experiments, results, tune
from study.tune import FAMILIES, KEPT, SEEDS, SETTINGS, search


def played(name, score):
    """A search to its end, and the runs that it asked for, from score(settings, seed)."""
    known, stages = {}, []
    while (found := search(name, lambda settings, seed: known.get((str(settings), seed)))).missing:
        stages.append(found.missing)
        known |= {(str(settings), seed): score(settings, seed) for settings, seed in found.missing}
    return found, stages


def inside(settings, seed):
    """Best at 2e-4 and λ = 2; a seed shifts all scores alike."""
    return -abs(settings["lr"] / 2e-4 - 1) - abs(settings.get("lam", 2) - 2) + seed


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_the_same_budget(name):
    _, (first, second, *_) = played(name, inside)
    assert len(first) == 2 * SETTINGS and {seed for _, seed in first} == set(SEEDS[:2])
    assert len(second) == 3 * KEPT and {seed for _, seed in second} == set(SEEDS[2:])


def test_a_setting_inside_its_ranges_is_chosen_in_one_round():
    found, stages = played("off_rl", inside)
    drawn = [settings for settings, seed in stages[0] if seed == SEEDS[0]]
    assert len(stages) == 2 and found.chosen == max(drawn, key=lambda settings: inside(settings, 0))
    assert found.score == pytest.approx(sum(inside(found.chosen, seed) for seed in SEEDS) / 5)


def test_the_choice_is_by_all_five_seeds():
    def lucky(settings, seed):  # what is best on two seeds is worst on the others
        return inside(settings, 0) * (1 if seed in SEEDS[:2] else -1)

    found, stages = played("off_rl", lucky)
    promoted = [settings for settings, seed in stages[1] if seed == SEEDS[2]]
    best = sorted((settings for settings, seed in stages[0] if seed == SEEDS[0]), key=lambda settings: -inside(settings, 0))
    assert promoted == best[:KEPT] and found.chosen == best[KEPT - 1]


def test_a_range_grows_where_the_choice_is_near_its_end():
    found, stages = played("fpa", lambda settings, seed: -settings["lr"])  # the lower the better
    assert len(found.asked) == tune.ROUNDS and found.ranges["lr"][0] <= 5e-6 / 8
    assert found.ranges["lr"][1] == 5e-3 and min(settings["lr"] for settings in found.asked[1]) < 5e-6
    assert found.chosen["lr"] == min(settings["lr"] for some in found.asked for settings in some)
    assert search("fpa", lambda settings, seed: None).asked == found.asked[:1]  # drawn alike in every process


def test_exactly_twice_an_end_is_near_it():
    low, high = tune.LR
    assert tune.grown({"lr": 2 * low}, {"lr": tune.LR}) == {"lr": (low / 8, high)}
    assert tune.grown({"lr": high / 2}, {"lr": tune.LR}) == {"lr": (low, 8 * high)}
    assert tune.grown({"lr": 2.01 * low}, {"lr": tune.LR}) == {"lr": tune.LR}


def test_no_reported_number_comes_from_a_seed_that_chose_something():
    seeds = {name: set(seeds) for name, (_, seeds) in experiments.EXPERIMENTS.items()}
    choosing = {name for name in seeds if name in ("pilot", "short") or name.endswith("-grid")}
    assert set(SEEDS).union(*(seeds[name] for name in choosing)) == set(results.TUNING_SEEDS)
    others = set().union(*(seeds[name] for name in seeds.keys() - choosing))
    assert others == {*range(5), *results.SEEDS} and not others & set(results.TUNING_SEEDS)
    assert not set(range(5)) & set(results.SEEDS)


def test_numbers_are_drawn_over_their_whole_ranges():
    drawn = [settings for name in FAMILIES for settings in tune.draw(name, 0, {"lr": tune.LR})]
    rates = sorted(settings["lr"] for settings in drawn)
    assert 5e-6 <= rates[0] < 1e-5 and 2.5e-3 < rates[-1] <= 5e-3
    assert 1e-4 < rates[len(rates) // 2] < 3e-4  # log-uniform
    assert {settings["schedule"] for settings in drawn} == set(tune.SCHEDULES)


def test_the_command_runs_a_search_resumes_it_and_publishes_it(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "SETTINGS", 2)
    monkeypatch.setattr(tune, "KEPT", 1)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "SEEDS", (0, 1, 2))
    monkeypatch.setattr(tune, "BUDGET", " ".join(TINY))
    shutil.copytree(finished[0] / "cache", tmp_path / "runs" / "cache")  # of seed 0
    words = ["--out", tmp_path / "runs", "--to", tmp_path / "results", "--jobs", "1"]
    tune.run(["sft", *map(str, words)])
    printed = capsys.readouterr().out
    assert "sft: round 1, 4 runs" in printed and "sft: round 1, 1 runs" in printed and "--loss sft --lr" in printed
    table = (tmp_path / "results" / "runs.csv").read_text().splitlines()
    assert len(table) == 6 and all("tune-sft" in line for line in table[1:])
    tune.run(["sft", *map(str, words)])  # nothing is left to do
    assert "round" not in capsys.readouterr().out
    tune.run(list(map(str, words)))
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 1 + len(FAMILIES) and sum("--loss sft --lr" in line for line in listed) == 1
    assert next(line for line in listed if line.startswith("sft ")).split()[1] == "5"


def test_an_unknown_family_is_one_line(capsys):
    code, error = refusal(tune.run, ["of_rl"], capsys)
    assert code == 2 and "did you mean off_rl?" in error and error.count("\n") == 1
