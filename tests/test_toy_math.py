"""toy_math: traces, slips, verifier, tokenizer, splits, rollouts and their overlap."""

import json
import random
import subprocess
import sys

import pytest
import torch

from toy_math import rollouts
from toy_math.problems import Problem, apply, draw_problems, read_problem, slip_results, verify, write_trace
from toy_math.rollouts import (
    corpus_rows,
    evaluate,
    max_completion_tokens,
    overlap,
    pack,
    prompt_tokens,
    rollout_rows,
    samples_text,
)
from toy_math.tokenizer import ALPHABET, BOS, EOS, PAD, VOCAB_SIZE, decode, encode

EXAMPLE = Problem(47, (("+", 8), ("*", 3), ("-", 5)))
CLEAN = "47+8=55;55*3=65;65-5=60;#60"


def test_the_documented_example():
    assert EXAMPLE.prompt == "47+8*3-5?"
    assert write_trace(EXAMPLE) == (CLEAN, [])


def test_trace_against_python_arithmetic():
    for problem in draw_problems(300, 6, "train", random.Random(0)):
        value = problem.start
        for op, digit in problem.ops:
            value = eval(f"{value}{op}{digit}") % 100
        assert write_trace(problem)[0].endswith(f"#{value:02d}")
        assert len(encode(write_trace(problem)[0])) + 1 == max_completion_tokens(6)


def test_slips_are_recorded_followed_and_as_frequent_as_asked():
    rng, slips_seen, steps = random.Random(1), [], 0
    for problem in draw_problems(2000, 6, "train", rng):
        trace, slips = write_trace(problem, 0.12, rng)
        by_step, value = {slip.step: slip.kind for slip in slips}, problem.start
        for step, (op, digit) in enumerate(problem.ops, start=1):
            text = trace[8 * (step - 1) : 8 * step]
            result = int(text[5:7])
            assert text.startswith(f"{value:02d}{op}{digit}=")  # later steps follow from the wrong value
            if step in by_step:
                assert result != apply(op, value, digit) and result in slip_results(op, value, digit)[by_step[step]]
            else:
                assert result == apply(op, value, digit)
            value = result
        verdict = verify(problem, trace)
        assert verdict.first_wrong_step == min(by_step, default=None) and not verdict.malformed
        slips_seen += slips
        steps += 6
    assert abs(len(slips_seen) / steps - 0.12) < 0.015
    assert {slip.kind for slip in slips_seen} == {"off_by_one", "off_by_two", "off_by_ten", "forgotten_carry"}


def test_forgotten_carry():
    assert slip_results("+", 47, 8)["forgotten_carry"] == [45]
    assert slip_results("*", 47, 8)["forgotten_carry"] == [26]  # 7*8 = 56: the 5 is lost from 376 -> 326
    assert slip_results("-", 52, 5)["forgotten_carry"] == [57]
    assert "forgotten_carry" not in slip_results("+", 41, 8)
    assert all(
        apply(op, v, d) not in sum(slip_results(op, v, d).values(), [])
        for op in "+-*"
        for v in range(100)
        for d in range(2, 10)
    )


@pytest.mark.parametrize(
    "completion, finished, correct, malformed, first_wrong_step",
    [
        (CLEAN, True, True, False, None),
        ("47+8=55;55*3=55;55-5=50;#50", True, False, False, 2),
        ("47+8=54;54*3=65;65-5=60;#60", True, True, False, 1),  # wrong on the way, right answer
        ("47+8=55;55*3=65;65-5=60;#61", True, False, False, 4),  # the answer itself
        (CLEAN, False, False, True, 4),  # never ended
        ("47+8=55;55*3=65;65-5=6", False, False, True, 3),
        ("47+8=55;55*3=65;#65", True, False, True, 3),  # a step short
        (CLEAN + "0", True, False, True, 4),
        ("", True, False, True, 1),
        ("60", True, False, True, 1),
        ("47+8=55;55*3=65;65-5=60;60", True, False, True, 4),
    ],
)
def test_verifier(completion, finished, correct, malformed, first_wrong_step):
    verdict = verify(EXAMPLE, completion, finished)
    assert (verdict.correct, verdict.malformed, verdict.first_wrong_step) == (correct, malformed, first_wrong_step)


def test_tokenizer_round_trip():
    assert len({BOS, EOS, PAD}) == 3 and VOCAB_SIZE == len(ALPHABET) + 3
    rng = random.Random(0)
    for length in range(60):
        text = "".join(rng.choices(ALPHABET, k=length))
        tokens = encode(text)
        assert len(tokens) == length and max(tokens, default=0) < BOS  # one token a character, none of them special
        assert decode(tokens + [EOS, PAD, PAD]) == (text, True)
        assert decode(tokens) == (text, False) and decode(tokens + [PAD, EOS]) == (text, False)


@pytest.mark.parametrize("text, culprit", [("47 +8?", "' '"), ("47÷8?", "'÷'"), ("<eos>", "'<'"), ("4\n", r"'\\n'")])
def test_text_outside_the_alphabet_is_named(text, culprit):
    with pytest.raises(ValueError, match=culprit):
        encode(text)


def test_train_and_test_never_overlap():
    train, test = (draw_problems(n, 1, split, random.Random(0)) for n, split in ((2000, "train"), (280, "test")))
    assert not set(train) & set(test) and len(set(train)) == 2000 and len(set(test)) == 280
    every = [Problem(start, ((op, digit),)) for start in range(100) for op in "+-*" for digit in range(2, 10)]
    assert {p.split for p in train} == {"train"} and {p.split for p in test} == {"test"}
    assert 0.08 < sum(p.split == "test" for p in every) / len(every) < 0.17


def test_too_few_problems():
    with pytest.raises(ValueError, match="train problems of 1 operation"):
        draw_problems(2400, 1, "train", random.Random(0))


def test_pack_trains_eos_and_never_pad():
    problems = draw_problems(2, 2, "train", random.Random(0))
    whole, cut = write_trace(problems[0])[0], write_trace(problems[1])[0][:5]
    samples = zip(problems, (whole, cut), (True, False))
    rows = rollout_rows([(*sample, verify(*sample)) for sample in samples])
    tokens, mask = pack(rows)
    assert tokens[0, : prompt_tokens(problems).shape[1]].tolist() == prompt_tokens(problems)[0].tolist()
    assert tokens[0][mask[0]].tolist() == encode(whole) + [EOS] and tokens[1][mask[1]].tolist() == encode(cut)
    assert tokens[0, 0] == BOS and (tokens[1, -10:] == PAD).all() and not (tokens[mask] == PAD).any()


def test_eos_gets_a_gradient():
    from losses import token_logps

    rows = [{"prompt": "47+8?", "completion": "47+8=55;#55", "finished": True}]
    tokens, mask = pack(rows)
    logits = torch.zeros(*tokens.shape, VOCAB_SIZE, requires_grad=True)
    (-token_logps(logits, tokens, mask).sum()).backward()
    last = mask[0].nonzero()[-1].item()
    assert tokens[0, last] == EOS and logits.grad[0, last - 1, EOS] < 0 < logits.grad[0, last - 1, PAD]


def test_rollout_rows_are_the_unpaired_preference_format():
    completion = "47+8=55;55*3=55;55-5=50;#50"
    rows = rollout_rows([(EXAMPLE, text, True, verify(EXAMPLE, text)) for text in (CLEAN, completion)])
    assert json.loads(json.dumps(rows))[1] == {
        "prompt": "47+8*3-5?", "completion": completion, "label": False,
        "problem_id": 0, "first_wrong_step": 2, "malformed": False, "finished": True,
    }  # fmt: skip
    assert rows[0]["label"] is True and rows[0]["first_wrong_step"] is None


def test_overlap_by_hand():
    def row(prompt, completion, label):
        return {"prompt": prompt, "completion": completion, "label": label}

    rows = [row("a", "12345678", True), row("a", "12995679", False), row("a", "1", False), row("b", "77", False)]
    # against 12345678: 12995679 shares positions 0 1 4 5 6 = 5/8 and a prefix of 2/8; "1" shares everything
    assert overlap(rows) == {
        "shared_tokens": pytest.approx((5 / 8 + 1) / 2),
        "common_prefix": pytest.approx((2 / 8 + 1) / 2),
        "incorrect": 2,
    }


def test_corpus_is_of_training_problems_and_keeps_its_slips():
    rows = corpus_rows(300, 6, 0.12, random.Random(0))
    test_prompts = {problem.prompt for problem in draw_problems(280, 1, "test", random.Random(0))}
    assert len(rows) == 300 and not {row["prompt"] for row in corpus_rows(2000, 1, 0.1, random.Random(0))} & test_prompts
    assert 0.3 < sum(not row["slips"] for row in rows) / 300 < 0.65  # 0.88^6 = 0.46
    for row in rows:
        if row["slips"]:
            assert row["slips"][0].kind in slip_results("+", 47, 8) | slip_results("+", 41, 8)


class Guesser:
    """Stands in for a policy: at temperature 0 the clean trace, else a trace that is clean half of the time."""

    def generate(self, prompts, max_new_tokens, eos, pad, temperature, generator, samples):
        completions = []
        for row in prompts.repeat_interleave(samples, dim=0).tolist():
            text, _ = decode(row[1:])
            clean = write_trace(read_problem(text))[0]
            heads = temperature == 0 or torch.rand((), generator=generator) < 0.5
            completions.append(encode(clean if heads else clean[:-1]) + [eos] + [pad] * (not heads))
        return torch.tensor(completions)


def test_samples_come_problem_by_problem_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(rollouts, "CPU_ROWS", 10)  # 3 problems of 3 samples at once
    problems = draw_problems(8, 2, "test", random.Random(0))
    samples = rollouts.sample(Guesser(), problems, 3, 1.0, torch.Generator().manual_seed(0))
    assert [problem for problem, *_ in samples] == [problem for problem in problems for _ in range(3)]
    assert all(text in write_trace(problem)[0] for problem, text, *_ in samples)
    assert all(verdict == verify(problem, text, finished) for problem, text, finished, verdict in samples)


def test_evaluation_counts_what_the_verifier_says():
    problems = draw_problems(100, 2, "test", random.Random(0))
    metrics, samples = evaluate(Guesser(), problems, 8, 1.0, torch.Generator().manual_seed(0))
    assert metrics["accuracy_greedy"] == 1 and abs(metrics["accuracy"] - 0.5) < 0.1
    assert metrics["malformed"] == pytest.approx(1 - metrics["accuracy"]) and len(samples) == 800
    lines = samples_text(samples).splitlines()
    assert [line.split()[0] for line in lines] == ["right"] * 5 + ["wrong"] * 5
    assert len({line.split()[1] for line in lines[:5]}) == len({line.split()[1] for line in lines[5:]}) == 5
    assert all("malformed   first wrong step: 3" in line for line in lines[5:])


@pytest.mark.slow
def test_toy_math_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "toy_math"], capture_output=True, text=True, check=True)
    assert "clean " in run.stdout and "slipped" in run.stdout and "same position" in run.stdout
    missing = subprocess.run([sys.executable, "-m", "toy_math", str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert missing.returncode == 2 and "none.jsonl" in missing.stderr and missing.stderr.count("\n") == 1
    for line in ('{"prompt": "47+8?"}', '{"prompt": "47+8?", "completion": "#55", "label": true}', "not JSON"):
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        bad = subprocess.run([sys.executable, "-m", "toy_math", str(tmp_path / "bad.jsonl")], capture_output=True, text=True)
        assert bad.returncode == 2 and "bad.jsonl: 1 of 1 lines are bad: line 1: " in bad.stderr and bad.stderr.count("\n") == 1
