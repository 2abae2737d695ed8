"""study/bench.py: what it counts and compares is what it says, its rows are whole, and docs/bench.md is its page."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import refusal
from torch.utils.flop_counter import FlopCounterMode

from model import GPTConfig
from plumbing import jobs
from study import bench, bench_full_scale, measuring
from toy_math.problems import Problem, verify

PAGE = bench.ROOT / "docs" / "bench.md"


def test_counted_operations_are_those_of_the_step():
    data = bench.pair_data(pairs=2)
    step = bench.stepper(bench.CONFIG, data)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == bench.step_flops(bench.CONFIG, data)
    multiply, own_flops = bench.own_sizes(bench.CONFIG, data)
    with FlopCounterMode(display=False) as counter:
        multiply()
    assert counter.get_total_flops() == own_flops < bench.step_flops(bench.CONFIG, data)


def test_pairs_are_right_and_wrong_answers_to_the_same_problems():
    data, rows = bench.pair_data(pairs=8, ops=3), bench.pair_rows(pairs=8, ops=3)
    assert [row["prompt"] for row in rows[:8]] == [row["prompt"] for row in rows[8:]]
    for row, reward in zip(rows, data.reward.tolist()):
        ops = tuple((row["prompt"][i], int(row["prompt"][i + 1])) for i in range(2, 8, 2))
        verdict = verify(Problem(int(row["prompt"][:2]), ops), row["completion"])
        assert not verdict.malformed and (reward > 0) == (verdict.first_wrong_step is None)
    assert data.start == len(rows[0]["prompt"]) and data.mask.int().argmax(-1).unique().tolist() == [1]


def test_a_ratio_is_taken_round_by_round():
    value, words = bench.ratio(np.array([1.0, 20.0, 3.0]), np.array([1.0, 10.0, 1.0]))
    assert value == 2 and words == "2.00 (1.50–2.50)"
    assert bench.goal(0.5, "≥", 0.5) == ("≥ 0.5", "yes") and bench.goal(0.49, "≥", 0.5)[1] == "**no**"
    assert bench.goal(1.03, "≤", 1.03)[1] == "yes" and bench.goal(1.04, "≤", 1.03)[1] == "**no**"
    calls = []
    seconds = bench.in_turn(2, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == list("ababab") and seconds["a"].shape == (2,)


def test_we_are_compared_with_the_fastest_peer():
    seconds = {"ours": np.array([1.0, 1, 2]), "sdpa": np.array([2.0, 2, 4]), "eager": np.array([3.0, 3, 3])}
    row = measuring.against_best("x", seconds, 1.5)
    assert row == ("x", "2.00 (2.00–2.00): 2000 ms (sdpa) / 1000 ms", "≥ 1.5", "yes")


def test_a_step_of_bench_trains_and_off_rl_needs_no_reference():
    data = bench.pair_data(pairs=2)
    first, second = bench.stepper(bench.CONFIG, data)(), bench.stepper(bench.CONFIG, data, "off_rl")()
    assert torch.isfinite(first).all() and first[0] != second[0]
    step = bench.stepper(bench.CONFIG, data, "off_rl")
    del data.columns["ref_logits"]
    step()


def twice(*_, **functions):
    """In the place of in_turn: the shipped step, or Off-RL's, takes a second, and any other takes two."""
    return {name: np.full(3, 1.0 if name in ("shipped", "off_rl") else 2.0) for name in functions}


def test_rows_of_real_measurements(monkeypatch):
    rows = bench.roofline(1, quick=True)
    assert all(row[3] in ("yes", "**no**") and re.search(r"\d of \d+ GFLOP/s", row[1]) for row in rows)
    ideas, growth = bench.ideas(1, quick=True), bench.growth(1, quick=True)
    assert len(ideas) == 7 and all(re.match(r"\d+\.\d\d \(", words) for row in ideas for words in row[1:3])
    monkeypatch.setattr(bench, "in_turn", twice)
    assert all(row[1].startswith("2.00 (") and row[2].startswith("2.00 (") for row in bench.ideas(1, quick=True))
    assert len(growth) == 4 and all(re.match(r"[\d,]+: \d+ ms; ", row[1]) and float(row[2]) < 3 for row in growth)


def test_an_idea_is_what_it_is_called(monkeypatch):
    asked, calls, fused = {}, [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(bench, "in_turn", lambda rounds, **functions: asked.update(functions))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *words, **more: calls.append(1) or fused(*words, **more)
    )
    bench.ideas_in_steps(1, bench.pair_data(pairs=2))

    def flops(name):
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            asked[name]()
        return counter.get_total_flops(), len(calls)

    shipped, none = flops("shipped")
    assert none == 0 and flops("fused")[1] == bench.CONFIG.n_layers
    assert flops("uncached")[0] == pytest.approx(shipped * 4 / 3) and flops("loop")[0] == shipped  # a forward pass more


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_holds_the_reference_of_fpa_only(monkeypatch):
    monkeypatch.setattr(bench, "in_turn", twice)
    seconds, memory = bench.overhead(1, quick=True)
    assert seconds[1].startswith("2.00 (") and seconds[3] == "**no**"
    ratio, more, base = map(float, re.match(r"(.*): (.*) MiB more than (.*) MiB", memory[1]).groups())
    assert 20 < more < 100 and ratio == pytest.approx(1 + more / base, abs=0.01)  # 34 MB of reference logits


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_the_loss_at_full_scale():
    plain, chunked = (bench_in_a_process(chunked) for chunked in (False, True))
    logits = 512 * 151_936 * 4 / 2**20  # MiB
    assert 2 * logits < plain < 8 * logits
    assert chunked < 4 * logits  # those of 256 positions, four at once, and a little


def bench_in_a_process(chunked):
    with jobs.workers(1) as pool:
        return pool.submit(bench_full_scale.loss_memory, chunked, 512, width=8).result()


def test_real_shapes_are_trained_by_full_scale(tmp_path):
    config = GPTConfig(vocab_size=1000, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, qkv_bias=True)
    rate, flops, line = bench_full_scale.full_scale_steps(tmp_path, config, prompt=5, completion=15, rows=16, steps=2)
    assert line.startswith("step     2/2") and "log-ratio" in line
    layers = 2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 48 + 3 * 32  # q, o; k, v; feed-forward; norms
    a_token = 6 * layers + 12 * 1 * 32 * 20
    assert flops == pytest.approx(rate * (a_token * 20 / 15 + 6 * 1000 * 32))


def test_few_shot_rows_share_their_beginning():
    config = GPTConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32)
    tokens = bench_full_scale.few_shot_tokens(config, 4, 10)
    assert tokens.shape == (4, 396) and (tokens[:, :386] == tokens[0, :386]).all() and len(tokens[:, 386:].unique(dim=0)) == 4
    pytest.importorskip("transformers")
    step, rate, sampling = bench_full_scale.few_shot(config, rows=4, prompts=2)
    assert float(step[1].split()[0]) > 1 and step[2] == "≥ 4" and 0 < float(rate[1].split()[0]) < 1 and rate[2] == "≥ 0.6"
    assert re.match(r"\d+\.\d\d \(.*ms \((sdpa|eager), at once\)", sampling[1]) and sampling[2] == "≥ 1.5"


def test_one_section_is_measured_anew_and_the_others_stay(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    monkeypatch.setattr(bench, "growth", lambda rounds, quick: [("x", "new", "1.00")])
    bench.run(["--only", "Growth", "--to", str(page)])
    old, new = (text.split("\n## ")[1:] for text in (PAGE.read_text(), page.read_text()))
    changed = [one.split("\n")[0] for one, other in zip(old, new, strict=True) if one.strip() != other.strip()]
    assert changed == ["Growth"] and "| x | new | 1.00 |" in page.read_text()


def test_the_main_job_is_timed_by_stage(tmp_path):
    whole, cached, share = bench.time_to_result(tmp_path, quick=True)
    assert re.search(r"whole \d.*base model \d.*rollouts \d.*reference \d", whole[1])
    assert "base model" not in cached[1] and re.match(r"whole \d", cached[1]) and 0 < float(share[1]) < 1


def test_peers_that_are_not_installed(monkeypatch):
    for name in ("transformers", "datasets", "trl"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = bench.peers(1, quick=True)
    assert len(rows) == 3 and all(row[1:] == ("not installed", "", "") for row in rows)


def test_peers_that_are():
    pytest.importorskip("trl")
    rows = bench.peers(1, quick=True)
    assert len(rows) == 3 and all(re.match(r"\d+\.\d\d \(.*ms", row[1]) for row in rows)


def test_the_committed_page_is_whole():
    page = PAGE.read_text()
    assert re.findall("^## (.*)$", page, flags=re.M) == list(bench.NOTES)
    assert all(note in page for note in bench.NOTES.values()) and "`python -m study.bench`;" in page
    assert "not installed" not in page and re.search(r"torch \d.*transformers \d.*trl \d", page)
    assert len(re.findall(r"^Measured on \d{4}-\d\d-\d\d\.$", page, flags=re.M)) == len(bench.NOTES)


@pytest.mark.parametrize("words", [["--quik"], ["--only", "Speed"], ["--to", "no/such/folder/bench.md"], ["--to", "tests"]])
def test_bad_flags_are_one_line(words, capsys):
    code, error = refusal(bench.run, words, capsys)
    assert code == 2 and words[-1] in error and error.count("\n") == 1
