r"""Whether an answer is right: where it stands, numbers in every spelling, gold answers, and what evaluate.py makes of it."""

import itertools
import json
import math
import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from test_docs import table
from test_full_scale import write
from test_full_scale_training import run_module
from torch.nn.utils.rnn import pad_sequence

import full_scale.rollouts
from full_scale.rollouts import read_problems
from full_scale.verdict import final_answer, gold_answer, is_correct, vote
from plumbing.files import UserError

generated = hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)


def boxed(text):
    return f"\\boxed{{{text}}}"


# --- where the answer stands: 42

STATED = r"""
\boxed {42} | \fbox{42} | \fbox {42} | \boxed 42 | $\boxed42$ | \boxed{\boxed{42}} | \boxed{$42$} | $\boxed{42}$
\[\boxed{42}\] | so \boxed{42}. As asked, in \boxed{}. | so \boxed{42}. As asked, in \boxed{...}.
\boxed{42}, in \boxed{\ldots} | \boxed{42} \boxed{ } | \boxed{42}, in \boxed{\text{your answer}}
\boxed{42}. I put it in \boxed form. | first \boxed{7}, no: \boxed {42} | \\boxed{42}. \\boxed{42}.
$$\boxed{42}$$ This is the final answer. | f(x) = { \boxed{42} | a } \boxed{42} | \boxed{\{42\}}
\boxed{\text{The answer is } 42} | \boxed{x = 42} | \boxed{42} and an unfinished \boxed{\frac{1 | \boxed{42}. \boxed{\text{?}}
The answer is 42. | The answer is 42 | The final answer is $42$. | the answer is: 42 | The answer is \(42\).
The answer is x = 42. | Final Answer: The final answer is $42$. I hope it is correct. | The answer is 50 - 8 = 42.
the answer to the problem is 42 | #### 42 | ####42 | so 42¶#### 42¶¶Question: what is 5? | #### 7¶#### 42
#### 42¶#### Conclusion | #### $42 | \fbox{7} \boxed{42} | \boxed{42}¶#### 2. Check it | \boxed{42}¶#### Step 3: check 5
\boxed{42} Answer: I took 3. | Answer: I took 3.¶#### 42 | Answer: 42 | **Answer:** 42 | **Answer**: 42 | ANSWER: 42
answer: **42** | Answer (in km): 42 | Answer:¶42 | Ans: 42 | Answer:42 | Answer: \[ 42 \] | Answer: $$x=42$$
Answer: 7¶Answer: 42 | The answer is **42**. | The answer is `42` | The answer would be 42. | The answer is 42<|im_end|>
The answer is 42</s> | The answer is 42 apples. | The answer is $42. | The answer is \$42. | The answer is $42.00 per hour.
The answer is 42.0. | The answer is 42 because 6*7 is 42. | The answer is 42, since 40+2 is. | The answer is 4.2e1.
The answer is therefore 42. | The answer is 7. Wait, the answer is 42. | \boxed{7} The answer is 42.
The answer is 7. \boxed{42} | The answer is $\boxed{42}$. | #### \boxed{42} | \boxed{42}. So the answer is correct.
\boxed{42}. The answer is \boxed{}. | The answer is 42. The answer is | The answer is 42! | The answer is exactly 42.
## Final Answer¶42 | **Final Answer**¶¶42 apples | <answer>42</answer> | The answer is clearly $42$. | \boxed{\,42\ }
\boxed{42\\}
"""  # between them |, and ¶ where a line ends
ELSEWHERE = r"""
The cities are 42 miles apart. Let | I do 42 steps first and then I was cut | Is it 5 or 42? I don't know | 42 | so 42
Is it 42? | \boxed{42 | \boxed{4}2 | \boxed{42} \boxed{7} | \boxed{42}, no: \fbox {7} | \boxedx{42} | \boxed{} 42
\boxed{42\} | 42 \boxed{?} | The answer is not 42. | The answer is 42 or 7. | The answer is 7 or 42. | The answer is 42 and 7.
The answer is 42x. | The answer is 42. Wait, the answer is 7. | #### 42¶#### 7 | \boxed{42} The answer is 7.
#### 1. Compute 42¶and | Answer: 2 * 42 | The answer is 42\pi. | The answer is 42 pi. | The answer is 42 million.
Answer: 42/7 | The answer is between 7 and 42. | The answer is 42i. | Answer: x > 42
"""
FINISHED = r"""
so we get 42. | It is 6*7=42 | She has 42 apples. | She makes $42 each day! | **42** | 42 | Thus $x = 42$. | Thus¶\[ x = 42 \]
So 42¶ | It is 42%. | It is 4.2 × 10¹ | I took 7 and 6. So I have 42 in all. | Answer: I took 7*6=42. So it is 42.
so 42.<|im_end|> | so 42</s>¶
"""
UNFINISHED = r"""
The cities are 42 miles apart. Let | I do 42 steps first and then I was cut | Is it 42? | Is it 5 or 42? I don't know
It is 5 or 42 | Take 42. So it is 7. | 42 is nice. Yes | \boxed{42
"""


def texts(table):
    return [text.strip().replace("¶", "\n") for line in table.strip().splitlines() for text in line.split(" | ")]


@pytest.mark.parametrize("completion", [*texts(STATED), "\\boxed\n{42}"])
def test_the_last_box_or_marker_that_holds_something_is_the_answer(completion):
    for finished in (False, True):
        assert is_correct("42", completion, finished)
        assert not is_correct("7", completion, finished)


@pytest.mark.parametrize("completion", [*texts(ELSEWHERE), ""])
def test_what_is_only_mentioned_is_no_answer(completion):
    assert not is_correct("42", completion)


@pytest.mark.parametrize("completion", texts(FINISHED))
def test_without_a_box_a_finished_answer_is_what_it_ends_in(completion):
    assert is_correct("42", completion, finished=True)
    assert not is_correct("42", completion, finished=False)
    assert not is_correct("42", completion, finished=True, strict=True)


@pytest.mark.parametrize("completion", texts(UNFINISHED))
def test_a_finished_answer_that_ends_in_words_has_none(completion):
    assert not is_correct("42", completion, finished=True)


def test_strict_takes_boxes_alone():
    assert is_correct("42", r"The answer is 7. \fbox{42} The answer is 7.", strict=True)
    for completion in ("The answer is 42.", "#### 42", "Answer: 42"):
        assert is_correct("42", completion) and not is_correct("42", completion, strict=True)


def test_words_count_behind_a_marker_where_nothing_else_does():
    assert is_correct("Evelyn", "The answer is Evelyn.") and is_correct(r"\text{Evelyn}", "The answer is evelyn.")
    assert is_correct("Evelyn", r"The final answer is $\text{Evelyn}$. I hope it is correct.")
    assert is_correct("B", "Answer: B") and is_correct(r"\text{(B)}", "The answer is (B).")
    assert not is_correct("Evelyn", "The answer is Briana.") and not is_correct("east", boxed("seats"))


PIECES = r"""\boxed{ \boxed{} \boxed{1} \fbox \boxed\a{ { } \ \\boxed{ \frac $ $$ \( \[ #### # Answer: answer answer_to
the_answer_is 1_ 1, 1,234 <| e5 10^ ½ a _ ¶ ** | \text{ ...""".split()


@generated
@hypothesis.given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4))
def test_the_answer_is_found_in_linear_time(pieces):
    """Eight times the text takes less than sixteen times the time, and not 64 times."""
    part = "".join(pieces).replace("_", " ").replace("¶", "\n")

    def seconds(size):
        text, begin = part * (size // len(part)), time.process_time()
        final_answer(text), final_answer(text, finished=True), final_answer(boxed(text))
        return time.process_time() - begin

    assert any(seconds(40_000) < 16 * seconds(5_000) + 0.05 for _ in range(3))  # the processor does other things too


# --- numbers


def decimal(value):
    """A fraction whose decimals end, written so."""
    places = next(n for n in itertools.count() if 10**n % value.denominator == 0)
    return f"{Decimal(int(value * 10**places)).scaleb(-places):f}"


def grouped(separator):
    def spelled(value):
        whole, point, rest = decimal(abs(value)).partition(".")
        return "-" * (value < 0) + f"{int(whole):,}".replace(",", separator) + point + rest

    return spelled


def scientific(form):
    def spelled(value):
        size, power = f"{Decimal(decimal(value)):e}".lower().split("e")
        return form.format(size, int(power))

    return spelled


def ratio(form):
    return lambda value: "-" * (value < 0) + form.format(abs(value.numerator), value.denominator)


def mixed(form):
    def spelled(value):
        whole, rest = divmod(abs(value), 1)
        written = form.format(whole, rest.numerator, rest.denominator) if whole and rest else decimal(abs(value))
        return "-" * (value < 0) + written

    return spelled


def bare(value):
    return decimal(value).replace("0.", ".", 1) if abs(value) < 1 and value % 1 else decimal(value)


def longer(value):
    return decimal(value) + ("0" if value % 1 else ".0")


def signed(value):
    return "+" * (value >= 0) + decimal(value).replace("-", "−")


POWERS = (
    "{}e{}",
    "{}E{:+03}",
    r"{} \times 10^{{{}}}",
    r"{}\cdot10^{{{}}}",
    "{} × 10^{}",
    "{}*10^({})",
    "{}*10**{}",
    "{} x 10^{}",
)
RATIOS = (
    r"\frac{{{}}}{{{}}}",
    r"\dfrac{{{}}}{{{}}}",
    "{}/{}",
    r"\left(\frac{{{}}}{{{}}}\right)",
    r"{{{} \over {}}}",
    "({})/({})",
)
SPELLED = [
    *(decimal, bare, longer, signed, scientific(r"{}\times{{10}}^{{{}}}")),
    *map(grouped, (",", "{,}", r"\,", " ", "\u202f", r"\ ", r",\!", "'")),
    *map(scientific, POWERS),
    *map(ratio, RATIOS),
    *map(mixed, (r"{}\frac{{{}}}{{{}}}", "{} {}/{}", r"{} \frac{{{}}}{{{}}}")),
]
DRESSED = r"{} | ${}$ | {}. |  {}  | {{{}}} | \text{{{}}} | \mathbf{{{}}} | \({}\) | **{}** | {}\text{{ cm}} | {}^\circ | \${}"
DRESSED = [*DRESSED.split(" | "), "{} dollars"]
values = st.builds(lambda digits, places: Fraction(digits, 10**places), st.integers(-(10**9), 10**9), st.integers(0, 12))
spelling = st.builds(
    lambda spelled, dress: lambda value: dress.format(spelled(value)), st.sampled_from(SPELLED), st.sampled_from(DRESSED)
)


@generated
@hypothesis.given(values, spelling, spelling)
def test_a_number_equals_itself_in_any_spelling_on_either_side(value, one, other):
    assert is_correct(one(value), boxed(other(value))), (one(value), other(value))
    assert is_correct(f"so ${boxed(one(value))}$.\n#### {one(value)}", f"#### {other(value)}"), (one(value), other(value))


@generated
@hypothesis.given(values, st.one_of(values, st.integers(-12, 12).map(lambda power: power)), spelling, spelling)
def test_unequal_numbers_are_never_equal(value, other, one, another):
    other = value + Fraction(10) ** other if isinstance(other, int) else other  # one digit away
    hypothesis.assume(value != other)
    assert not is_correct(one(value), boxed(another(other))), (one(value), another(other))


@generated
@hypothesis.given(values, spelling)
def test_a_percentage_is_its_hundredth_or_itself_without_the_sign(value, spelled):
    for sign in (r"\%", "%", " percent", r"\text{ percent}"):
        percent = decimal(value) + sign
        for equal in (value, value / 100):
            assert is_correct(percent, boxed(spelled(equal))) and is_correct(spelled(equal), boxed(percent)), (
                percent,
                spelled(equal),
            )
        assert is_correct(percent, boxed(grouped(",")(value) + r"\%"))
        assert value == 0 or not any(is_correct(percent, boxed(spelled(wrong))) for wrong in (value * 100, value / 10))
        assert value == 0 or not is_correct(percent, boxed(decimal(value * 100) + sign))


@generated
@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False), spelling)
def test_a_number_of_json_is_written_without_an_exponent(tmp_path_factory, value, spelled):
    gold = gold_answer(json.loads(json.dumps(value)))
    assert not re.search("[eE]", gold) and Fraction(gold) == Fraction(repr(value))
    assert is_correct(gold, boxed(repr(value)))


EQUAL = r"""
1/3 = 0.333333 | 0.3 = 0.30000000000000004 | 0.\overline{3} = \frac13 | 0.1\overline{6} = 1/6 | 3/2 = 1½ | ½ = .5 | 1000 = 10³
4.5e33 = 4.5\cdot 10^{33} \text{ erg} | 4.5e33 = 4.5 \times 10^{33} \mathrm{~erg} / \mathrm{s} | 1e16 = 10^{16}
1e-10 = 10^{-10} | 1.2 million = 1,200,000 | 18 = $18.00 | -5 = −5 | 12 = １２ | 8 = 8 apples | 8 = \text{8 apples} | 45 = 45°
5 = 5 cm | 8 = 8, | 0.02 = 2 × 10⁻² | 0.02 = 2x10^-2 | 4.5e33 = 4.5e{33} | 8 = $8$ | 5 = 5. | 5 = 005 | -2 = -(\frac{4}{2})
50% = 0.5 | x^2+1 = 1+x^2 | \sqrt{2} = 1.414214 | \frac{\pi}{2} = \pi/2 | 120 = 5! | 16 = 2^4 | \infty = \infty | 1,2 = 2,1
12.5\% = 12.5 | east = \text{East} | A = (A) | \text{(A)} = A | No solution = \text{no solution} | 7:30 = 7:30
1.5e3 x = 1500x | (1, 2e3) = (1, 2000) | 20 = 20^\circ\text{C} | 20 = 20°C | 7 = \boldsymbol{7} | 15 = 1.5 \times 10
3.0e8 = 3.0 \cdot 10^8 \text{ m/s} | 0 = -0.0
"""
UNEQUAL = r"""
1/3 = 0.33333 | 1/3 = 0.3333 | 0.0000001 = 0.0000002 | 0 = 1e-7 | 6.6e-34 = 1.05e-34 \text{ J s} | 1e-8 = 1/30000000
6.6e-34 = 1.05 \times 10^{-34} \frac{J}{s} | 4.5e33 = 4.5e32 | 0.1234567 = 0.1234568 | 10000000 = 10000001
333333 = 1000000/3 | 1e16 = 10000000000000001 | 1/999983 = 1/999984 | 50\% = 5000\% | 2 = 2\pi | 7 = 5 or 7 | 3.14 = \pi
(1,2) = (2,1) | [0,1) = [0,1] | 5 = 1/0 | 2e = 2 | 5 = not 5 | 3 = x \geq 3 | 12 = 1,2 | 1.5 = 1 \cdot 1/2 | x = y | yes = no
5x = 5 | \frac{1}{2} = \frac{2}{1}
"""


@pytest.mark.parametrize("pair", texts(EQUAL))
def test_equal_answers_are_equal_on_either_side(pair):
    gold, answer = pair.split(" = ")
    assert is_correct(gold, boxed(answer)) and is_correct(answer, boxed(gold))


@pytest.mark.parametrize("pair", texts(UNEQUAL))
def test_other_answers_are_not(pair):
    gold, answer = pair.split(" = ")
    assert not is_correct(gold, boxed(answer)) and not is_correct(answer, boxed(gold))


def test_an_equation_equals_its_right_side_and_not_that_of_another_unknown():
    assert is_correct("4.5e33", boxed(r"E = 4.5 \times 10^{33}")) and is_correct("x = 5", boxed("5"))
    assert is_correct("11", boxed("5+6=11")) and is_correct("2.7", boxed(r"x \approx 2.7"))
    assert not is_correct("x = 5", boxed("y = 5")) and not is_correct("5", boxed("x = 1, x = 5"))
    assert not is_correct("5", boxed(r"x \neq 5")) and not is_correct("5", boxed("x >= 5"))


@pytest.mark.parametrize("answer", ["{" * 600 + "}" * 600, "1" * 9000, "\\frac{1}{" * 80 + "}" * 80])
def test_an_answer_that_cannot_be_reckoned_is_wrong(answer):
    assert not is_correct("5", boxed(answer)) and not is_correct(answer, boxed("5"))


# --- gold answers


def test_gold_answers_are_read_as_data_sets_write_them(tmp_path):
    written = [
        0.00005,
        1e16,
        2,
        2.5,
        "4.5e33",
        "7*6\n#### 42",
        r"Thus $x = \boxed{\frac{1}{2}}$.",
        [r"\arcsin{1.3 \sin{\theta_w}}"],
    ]
    path = write(tmp_path / "problems.jsonl", *({"problem": "p", "answer": answer} for answer in written))
    read = ["0.00005", "10000000000000000", "2", "2.5", "4.5e33", "42", r"\frac{1}{2}", r"\arcsin{1.3 \sin{\theta_w}}"]
    assert [answer for _, answer in read_problems(path)] == read
    completions = (
        "0.00005",
        "10^{16}",
        "2.0",
        r"\frac{5}{2}",
        r"4.5 \times 10^{33}",
        "42.",
        ".5",
        r"\arcsin(1.3\sin(\theta_w))",
    )
    assert all(is_correct(gold, boxed(completion)) for gold, completion in zip(read, completions, strict=True))


NO_ANSWERS = [
    "...",
    "?",
    "N/A",
    "nan",
    "None",
    "null",
    r"\boxed{}",
    "I give up\n####",
    r"\frac{1}{",
    "}",
    "x" * 2000,
    math.nan,
    math.inf,
]


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_a_gold_answer_that_is_none_is_a_bad_line(answer, tmp_path, capsys):
    path = write(tmp_path / "problems.jsonl", {"problem": "p", "answer": 1}, {"problem": "p", "answer": answer})
    with pytest.raises(UserError, match="1 of 2 lines are bad: line 2: answer is .*, which is no answer"):
        read_problems(path)
    assert read_problems(path, skip_bad=True) == [("p", "1")]


def test_true_is_no_gold_answer(tmp_path):
    with pytest.raises(UserError, match="line 1: answer is true, not a text or a number"):
        read_problems(write(tmp_path / "problems.jsonl", {"problem": "p", "answer": True}))


# --- the commands


@pytest.fixture
def answering(checkpoint, tmp_path, monkeypatch):
    """A function that runs rollouts.py or evaluate.py where the checkpoint says given texts, each finished or not."""

    def run(said, *flags, module="rollouts", n=1, gold="42", out="out.jsonl"):
        texts, tokenizer = iter(said), full_scale.rollouts.load_pretrained(checkpoint)[1]

        def generate(self, prompt, *rest):
            some = itertools.islice(texts, len(prompt) * rest[-1])
            rows = [tokenizer.encode(text, special=False) + [tokenizer.eos] * finished for text, finished in some]
            return pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=-1)

        monkeypatch.setattr("model.GPT.generate", generate)
        problems = write(tmp_path / "p.jsonl", *({"problem": f"{i}?", "answer": gold} for i in range(len(said) // n)))
        done = run_module(module, "--model", checkpoint, "--problems", problems, "--n", n, "--out", tmp_path / out, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    return run


SAID = [("so 42.", True), ("so 42 miles", False), ("The answer is 42.", False), ("I do not know.", True), (boxed("42"), False)]


def test_a_row_is_labelled_by_what_it_states(answering):
    out, rows = answering(SAID)
    assert [row["label"] for row in rows] == [True, False, True, False, True]
    assert [row["finished"] for row in rows] == [finished for _, finished in SAID]
    assert "60.0% correct, 40.0% finished, 2 answers could not be parsed" in out


def test_strict_labels_boxes_alone_and_a_file_is_of_one_kind(answering, tmp_path, checkpoint):
    out, rows = answering(SAID, "--strict")
    assert [row["label"] for row in rows] == [False, False, False, False, True]
    assert "20.0% correct, 40.0% finished, 4 answers could not be parsed" in out
    flags = ["--model", checkpoint, "--problems", tmp_path / "p.jsonl", "--n", 1, "--out", tmp_path / "out.jsonl"]
    assert "was made with other settings" in run_module("rollouts", *flags).stderr


def test_evaluation_prints_pass_and_majority_at_k(answering):
    right, wrong, same, none = ((text, True) for text in ("#### 42", boxed("7"), "Answer: 7.0", "no"))
    said = [right, wrong, none, right] + [wrong, same, right, right] + [right, wrong, same, none]
    out, rows = answering(said, module="evaluate", n=4)
    assert [row["label"] for row in rows] == [text is right for text in said]
    passed = [
        np.mean([any(some) for some in itertools.combinations([text is right for text in said[i : i + 4]], 2)])
        for i in (0, 4, 8)
    ]
    lines = [
        ("pass@1", [0.5, 0.5, 0.25], "   (standard error over 3 problems, 4 samples each)"),
        ("pass@2", passed, ""), ("maj@2", [0.75, 0.5, 0.25], ""),  # a tie counts half
        ("pass@4", [1, 1, 1], ""), ("maj@4", [1, 0.5, 0], ""),
    ]  # fmt: skip
    for name, measured, more in lines:
        error = np.std(measured, ddof=1) / math.sqrt(3)
        assert f"{name} {np.mean(measured):.4f} ± {error:.4f}{more[2:]}" in out
    assert "3 answers could not be parsed" not in out and "2 answers could not be parsed" in out


def test_one_problem_has_no_standard_error(answering):
    out, _ = answering([("#### 42", True), ("#### 7", True), ("#### 42", True)], module="evaluate", n=3)
    assert "pass@1 0.6667 (one problem, 3 samples)" in out and "pass@3 1.0000   maj@3 1.0000" in out
    assert "nan" not in out and "±" not in out
    out, _ = answering([("#### 42", True)], module="evaluate", out="one.jsonl")
    assert "pass@1 1.0000 (one problem, 1 sample)" in out and "@1 " in out and "maj" not in out


def test_equal_answers_vote_together():
    rows = [
        {"completion": boxed(text), "finished": True}
        for text in (r"\frac{2}{4}", "0.5", r"x^2+1", "1+x^2", "East", r"\text{east}")
    ]
    votes = [vote(row) for row in rows]
    assert votes[::2] == votes[1::2] and len(set(votes)) == 3
    assert (
        vote({"completion": "no", "finished": True}) is None
        and vote({"completion": boxed("x" * 2000), "finished": True}) is None
    )


# --- docs/full_scale.md

PAGE = Path("docs/full_scale.md")


@pytest.mark.parametrize("row", table(PAGE, "completion"), ids=str)
def test_the_docs_answers_are_those_that_are_read(row):
    completion, finished, answer, strict = (cell.strip("`") for cell in row)
    assert str(final_answer(completion, finished == "yes")).lower() == answer
    assert str(final_answer(completion, finished == "yes", strict=True)).lower() == strict


@pytest.mark.parametrize("row", table(PAGE, "gold answer"), ids=str)
def test_the_docs_spellings_are_equal_or_not(row):
    (gold,), equal, unequal = (re.findall("`([^`]+)`", cell) for cell in row)
    for answer in equal + unequal:
        assert is_correct(gold, boxed(answer)) is is_correct(answer, boxed(gold)) is (answer in equal), answer
