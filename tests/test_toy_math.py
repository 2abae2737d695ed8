"""toy_math: traces, slips, habits, verifier, tokenizer, splits, rollouts and their overlap, evaluation."""

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_train import refusal

import toy_math.__main__
from toy_math import rollouts
from toy_math.problems import Problem, apply, draw_problem, draw_problems, read_problem, slip_results, verify, write_trace
from toy_math.rollouts import (
    corpus_rows,
    entropy,
    evaluate,
    max_completion_tokens,
    overlap,
    pack,
    pass_at,
    prompt_tokens,
    rollout_rows,
    samples_text,
)
from toy_math.tokenizer import ALPHABET, BOS, EOS, PAD, VOCAB_SIZE, decode, encode

EXAMPLE = Problem(47, (("+", 8), ("*", 3), ("-", 5)))
CLEAN = "47+8=55;55*3=65;65-5=60;#60"
COUNTS_OF_ONE_OPERATION = {"train": 1800, "validation": 300, "test": 300}


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


def test_habits_are_the_carries_and_borrows_of_high_digits_as_frequent_as_asked():
    rng, shows, forgotten, slipped, steps = random.Random(1), 0, 0, 0, 0
    for problem in draw_problems(3000, 6, "train", rng):
        trace, slips = write_trace(problem, 0.03, rng, 0.6)
        kinds, value = {slip.step: slip.kind for slip in slips}, problem.start
        for step, (op, digit) in enumerate(problem.ops, start=1):
            result, ones = int(trace[8 * step - 3 : 8 * step - 1]), value % 10
            needed = digit in (7, 8, 9) and {"+": ones + digit > 9, "-": ones < digit, "*": False}[op]
            if kinds.get(step) == "habit":
                units = ones + digit if op == "+" else ones - digit
                assert needed and result == value // 10 * 10 + units % 10 != apply(op, value, digit)
                forgotten += 1
            elif step not in kinds:
                assert result == apply(op, value, digit)
            shows, slipped, steps, value = shows + needed, slipped + (step in kinds), steps + 1, result
        assert verify(problem, trace).first_wrong_step == min(kinds, default=None)
    slipped -= forgotten
    for count, of, rate in ((forgotten, shows, 0.6), (slipped, steps - forgotten, 0.03)):
        assert of > 1000 and abs(count / of - rate) < 4 * math.sqrt(rate * (1 - rate) / of)


def test_with_every_habit_most_answers_are_wrong():
    problems = draw_problems(3000, 6, "train", random.Random(0))
    traces = [write_trace(problem, habit_rate=1.0) for problem in problems]  # at a rate above 0.5, the most likely ones
    wrong = [not verify(problem, trace).correct for problem, (trace, _) in zip(problems, traces)]
    assert 0.5 < sum(wrong) / 3000 < 0.7 and all(slips for (_, slips), mistaken in zip(traces, wrong) if mistaken)
    assert {slip.kind for _, slips in traces for slip in slips} == {"habit"}


def test_without_a_habit_the_traces_are_those_of_the_first_study():
    """The checksum is of traces that its version of write_trace wrote."""
    for words in ((), (0.0,)):
        rng = random.Random(0)
        text = "\n".join(write_trace(draw_problem(6, rng), 0.12, rng, *words)[0] for _ in range(500))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9ae417218d4ef3ad"


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


def test_splits_never_overlap_and_have_their_shares():
    every = {Problem(start, ((op, digit),)) for start in range(100) for op in "+-*" for digit in range(2, 10)}
    drawn = [draw_problems(n, 1, split, random.Random(0)) for split, n in COUNTS_OF_ONE_OPERATION.items()]
    assert [len(set(some)) for some in drawn] == list(COUNTS_OF_ONE_OPERATION.values())
    assert sum(map(len, drawn)) == len(every) and set().union(*drawn) == every  # so none is in two of them
    rng, n = random.Random(0), 20_000
    splits = [draw_problem(6, rng).split for _ in range(n)]
    for split, share in (("train", 6 / 8), ("validation", 1 / 8), ("test", 1 / 8)):
        assert abs(splits.count(split) / n - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_too_few_problems():
    for split, count in COUNTS_OF_ONE_OPERATION.items():
        with pytest.raises(ValueError, match=f"only {count} different {split} problems of 1 operation"):
            draw_problems(count + 1, 1, split, random.Random(0))


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


def test_corpus_is_of_training_problems_with_errors():
    rows = corpus_rows(300, 6, 0.12, random.Random(0))
    clean = [verify(read_problem(row["prompt"]), row["completion"]).first_wrong_step is None for row in rows]
    assert len(rows) == 300 and 0.3 < sum(clean) / 300 < 0.65  # 0.88^6 = 0.46
    with_habit = corpus_rows(2000, 1, 0.0, random.Random(0), 0.6)
    assert {read_problem(row["prompt"]).split for row in with_habit} == {"train"}
    wrong = [row for row in with_habit if not verify(read_problem(row["prompt"]), row["completion"]).correct]
    assert 100 < len(wrong) < 1000 and all(row["prompt"][3] in "789" for row in wrong)  # such as 47+8?


class Guesser:
    """Stands in for a policy: at temperature T a trace that is clean with probability 1 - T / 2; all tokens as likely."""

    def __call__(self, tokens):
        return torch.zeros(*tokens.shape, VOCAB_SIZE)

    def generate(self, prompts, max_new_tokens, eos, pad, temperature, generator, samples):
        completions, temperatures = [], torch.as_tensor(temperature).expand(samples).repeat(len(prompts)).tolist()
        for row, t in zip(prompts.repeat_interleave(samples, dim=0).tolist(), temperatures, strict=True):
            text, _ = decode(row[1:])
            clean = write_trace(read_problem(text))[0]
            heads = torch.rand((), generator=generator) < 1 - t / 2
            completions.append(encode(clean if heads else clean[:-1]) + [eos] + [pad] * (not heads))
        return torch.tensor(completions)


def test_samples_come_problem_by_problem_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(rollouts, "CPU_ROWS", 10)  # 3 problems of 3 samples at once
    problems = draw_problems(8, 2, "test", random.Random(0))
    samples = rollouts.sample(Guesser(), problems, 3, 1.0, torch.Generator().manual_seed(0))
    assert [problem for problem, *_ in samples] == [problem for problem in problems for _ in range(3)]
    assert all(text in write_trace(problem)[0] for problem, text, *_ in samples)
    assert all(verdict == verify(problem, text, finished) for problem, text, finished, verdict in samples)


def test_each_kind_of_sample_has_its_temperature(monkeypatch):
    asked, plain = [], rollouts.sample
    monkeypatch.setattr(rollouts, "sample", lambda *words: asked.append(words[2:4]) or plain(*words))
    problems, generator = draw_problems(2, 2, "test", random.Random(0)), torch.Generator().manual_seed(0)
    evaluate(Guesser(), problems, 16, generator)
    rollouts.sample_groups(Guesser(), problems, SimpleNamespace(rollouts=4, dapo=False), generator)
    (_, of_exam), of_grpo = asked
    assert of_exam == [1.0] * 16 + [0.7] * 4 + [0.0] and of_grpo == (4, 1.0)


def test_evaluation_counts_what_the_verifier_says():
    problems = draw_problems(150, 2, "test", random.Random(0))
    columns, samples = evaluate(Guesser(), problems, 16, torch.Generator().manual_seed(0))
    assert columns["accuracy_greedy"] == 1 and abs(columns["accuracy"] - 0.5) < 0.05 < abs(columns["accuracy_0.7"] - 0.5)
    assert abs(columns["accuracy_0.7"] - 0.65) < 0.08  # of 600 samples: four standard errors
    assert len(samples) == 150 * 16 and [s[0] for s in samples] == [p for p in problems for _ in range(16)]
    correct = [[verdict.correct for *_, verdict in samples[i : i + 16]] for i in range(0, len(samples), 16)]
    assert columns["accuracy"] == pytest.approx(sum(map(sum, correct)) / 2400)
    assert columns["malformed"] == pytest.approx(1 - columns["accuracy"]) and columns["pass@16"] == 1
    assert columns["pass@4"] == pytest.approx(sum(by_subsets(4, some) for some in correct) / 150)
    assert columns["entropy"] == pytest.approx(math.log(VOCAB_SIZE))
    lines = samples_text(samples).splitlines()
    assert [line.split()[0] for line in lines] == ["right"] * 5 + ["wrong"] * 5
    assert len({line.split()[1] for line in lines[:5]}) == len({line.split()[1] for line in lines[5:]}) == 5
    assert all("malformed   first wrong step: 3" in line for line in lines[5:])
    with pytest.raises(ValueError, match="pass@16 needs at least 16 samples, not 8"):
        evaluate(Guesser(), problems[:2], 8, torch.Generator())


def by_subsets(k, correct):
    """The share of the subsets of k samples that hold a correct one, counted."""
    subsets = list(itertools.combinations(correct, k))
    return sum(map(any, subsets)) / len(subsets)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for k, right in itertools.product(range(1, n + 1), range(n + 1)):
            assert pass_at(k, n, right) == pytest.approx(by_subsets(k, [i < right for i in range(n)]))
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, not 4"):
        pass_at(5, 4, 2)


def test_entropy_is_that_of_the_positions_of_the_completions():
    """Two tokens at 1/2 before the odd ones of a completion, one at 1/2 and two at 1/4 before the even ones."""
    probabilities = torch.full((2, VOCAB_SIZE), 1e-30)
    probabilities[0, :2], probabilities[1, :3] = 0.5, torch.tensor([0.5, 0.25, 0.25])
    texts = (CLEAN, True), (CLEAN[:5], False)  # of 28 tokens with EOS, and of 5
    samples = [(EXAMPLE, text, finished, verify(EXAMPLE, text, finished)) for text, finished in texts]
    first = len(prompt_tokens([EXAMPLE])[0]) - 1  # the position before the first token of a completion

    def model(tokens):
        logits = torch.randn(*tokens.shape, VOCAB_SIZE)  # before prompts and padding, which do not count
        for row, length in enumerate((28, 5)):
            logits[row, first : first + length] = probabilities[torch.arange(length) % 2].log() + 3
        return logits

    by_hand = [math.log(2), 0.5 * math.log(2) + 2 * 0.25 * math.log(4)]
    expected = (17 * by_hand[0] + 16 * by_hand[1]) / 33
    assert entropy(model, samples, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_toy_math_command():
    for words, kind, likely in (([], "habit in step ", "wrong in 6"), (["--task", "slips"], " in step ", "wrong in 0% of")):
        run = subprocess.run([sys.executable, "-m", "toy_math", *words], capture_output=True, text=True, check=True)
        assert "clean " in run.stdout and "wrong " in run.stdout and "same position" in run.stdout
        assert kind in run.stdout and likely in run.stdout and ("habit" in run.stdout) == (not words)


def test_a_bad_file_of_the_command_is_one_line(tmp_path, capsys):
    code, error = refusal(toy_math.__main__.run, [tmp_path / "none.jsonl"], capsys)
    assert code == 2 and "none.jsonl" in error and error.count("\n") == 1
    for line in ('{"prompt": "47+8?"}', '{"prompt": "47+8?", "completion": "#55", "label": true}', "not JSON"):
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        code, error = refusal(toy_math.__main__.run, [tmp_path / "bad.jsonl"], capsys)
        assert code == 2 and "bad.jsonl: 1 of 1 lines are bad: line 1: " in error and error.count("\n") == 1
