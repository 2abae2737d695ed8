"""The exercises of the lesson: points, minutes, and checks on random cases that say what is wrong.

    check("fpa_loss", fpa_loss)     # in the notebook, below the exercise

A check draws new cases at every call, so that no constant passes, and compares with losses.py. Where an answer is wrong, it
prints what was expected and what came for one row. Where the answer is that of a usual mistake, a hint follows: MISTAKES holds
such answers. docs/lesson/grade.py gives the points.
Left out: protection against code that means harm. A check calls what the student wrote.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from losses import fpa_loss, future_logits, off_rl_loss, token_logps
from study import faults

CASES = 5  # random ones of a check
ROWS, PROMPT, LONGEST, VOCABULARY = 6, 3, 6, 7  # of a random batch


class Wrong(Exception):
    """An answer is not right; says why."""


@dataclass(frozen=True)
class Exercise:
    """What is asked, and `verify(answer)`, which raises Wrong."""

    points: int
    minutes: int
    difficulty: str
    verify: callable


def check(name, answer):
    """Whether an answer is right; prints so, or what is wrong with it."""
    try:
        EXERCISES[name].verify(answer)
    except Wrong as wrong:
        print(f"not yet: {wrong}")
        return False
    print(f"right: {EXERCISES[name].points} points")
    return True


# --- functions, against the right one on random cases


def compared(name, right, draw, measured):
    """A `verify` of functions. draw() gives a case, and measured(function, case) {label: number} of it."""

    def verify(answer):
        if not callable(answer):
            raise Wrong("this must be a function")
        for case in (draw() for _ in range(CASES)):
            expected, got = measured(right, case), called(measured, answer, case)
            errors = {label: error(got[label], value) for label, value in expected.items()}
            worst = max(errors, key=errors.get)
            if errors[worst] > 0:
                said = f"{worst}: expected {expected[worst]:.4f}, got {got[worst]:.4f}"
                raise Wrong(said + hint(MISTAKES[name], measured, case, got))

    return verify


def called(measured, answer, case):
    """measured(answer, case), with what the student's code raises as Wrong."""
    try:
        return measured(answer, case)
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"the function raises {type(error).__name__}: {error}") from None


def error(got, expected):
    """How far a number is from what was expected; 0 within rounding, infinity for NaN."""
    far = abs(got - expected)
    return math.inf if math.isnan(far) else far if far > 1e-5 + 1e-3 * abs(expected) else 0.0


def hint(mistakes, measured, case, got):
    """The hint of the usual mistake that gives the same numbers; nothing where none does."""
    for text, mistake in mistakes.items():
        made = measured(mistake, case)
        if not any(error(got[label], value) for label, value in made.items()):
            return f"\nhint: {text}"
    return ""


def numbers(value, shape, what):
    """A tensor of float64 of this shape. Raises Wrong for anything else, as the dots of an unfilled exercise."""
    if value is None or value is ...:
        raise Wrong("the function returns nothing yet: write its body")
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"it returns {type(value).__name__}, not {what}") from None
    if tuple(value.shape) != shape:
        raise Wrong(f"it returns shape {tuple(value.shape)}, not {shape}: {what}")
    return value


# --- random cases


def random_batch():
    """Rows as the model sees them: logits, ref_logits (B, T, V), tokens, mask (B, T), reward (B,), length (B,).

    Rows have lengths of their own and padding behind them. Two rows at least are correct, and two are incorrect.
    """
    width = PROMPT + LONGEST
    length = torch.randint(2, LONGEST + 1, (ROWS,))
    length[0] = LONGEST - 1  # no batch whose rows are all of one length, or without padding
    position = torch.arange(width)
    mask = (position >= PROMPT) & (position < PROMPT + length[:, None])
    tokens = torch.randint(VOCABULARY, (ROWS, width))
    logits = torch.randn(ROWS, width, VOCABULARY)
    logits[:, :-1] += 2 * torch.nn.functional.one_hot(tokens[:, 1:], VOCABULARY)  # so that pi_bar is not tiny
    ref_logits = logits + 0.5 * torch.randn_like(logits)
    reward = torch.cat([torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.randint(2, (ROWS - 4,)) * 2.0 - 1])[torch.randperm(ROWS)]
    return SimpleNamespace(logits=logits, ref_logits=ref_logits, tokens=tokens, mask=mask, reward=reward, length=length)


def weights(loss, b, *arguments):
    """C |y| of every row from a loss's gradient, and how much of it is not along grad logp_mean: {label: number}.

    The loss is called with logits that need a gradient, and with the named tensors of the batch b.
    """
    logits = b.logits.clone().requires_grad_()
    given = {"ref_logits": b.ref_logits.clone(), "tokens": b.tokens, "mask": b.mask, "reward": b.reward.clone()}
    value = numbers(loss(logits, *(given[name] for name in arguments)), (), "one number, the mean over rows")
    if not value.requires_grad:
        raise Wrong("the loss has no gradient: detach the weight alone")
    (gradient,) = torch.autograd.grad(value, logits)
    logits = b.logits.clone().requires_grad_()
    logp_mean = token_logps(logits, b.tokens, b.mask).sum(-1) / b.length
    (direction,) = torch.autograd.grad(logp_mean.sum(), logits)  # (B, T, V); a row's logits move that row alone
    along = (gradient * direction).sum((1, 2)) / direction.square().sum((1, 2))
    across = (gradient - along[:, None, None] * direction).flatten(1).norm(dim=1) * ROWS
    rows = [f"row {i} ({'correct' if r > 0 else 'incorrect'})" for i, r in enumerate(b.reward.tolist())]
    found = {f"C·|y| of {row}": value for row, value in zip(rows, (-b.reward * along * ROWS).tolist())}
    return found | {f"gradient of {row} that is not along ∇ logp_mean": value for row, value in zip(rows, across.tolist())}


PLAIN = ("tokens", "mask", "reward")  # the arguments of off_rl_loss behind logits
FUTURE = ("ref_logits", *PLAIN)


def weights_off_rl(loss, b):
    return weights(loss, b, *PLAIN)


def weights_fpa(loss, b):
    """At two values of λ: the default and another one."""
    found = weights(loss, b, *FUTURE)
    other = weights(lambda *given: loss(*given, 0.7), b, *FUTURE)
    return found | {f"λ = 0.7, {label}": value for label, value in other.items()}


def measured_pi_bar(function, b):
    logps = token_logps(b.logits, b.tokens, b.mask)
    value = numbers(function(logps, b.mask), (ROWS,), "a number a row")
    return {f"π̄ of row {i}, |y| = {n}": x for i, (n, x) in enumerate(zip(b.length.tolist(), value.tolist()))}


def measured_future(function, b):
    """Log-probabilities of two tokens a row, since logits are free up to a constant."""
    value = numbers(function(b.logits, b.ref_logits, b.lam), tuple(b.logits.shape), "logits, as those that it is given")
    logps = value.detach().log_softmax(-1)[:, PROMPT, :2].tolist()
    labels = [[f"λ = {b.lam:.2f}, row {i}, log π̂ of token {j}" for j in range(2)] for i in range(ROWS)]
    return {label: x for names, row in zip(labels, logps) for label, x in zip(names, row)}


def measured_scalar(*names):
    """Of functions of some random numbers, a case each a dict."""

    def measured(function, case):
        value = numbers(function(*case.values()), (), "one number")
        given = ", ".join(f"{name} = {case[name]:.3g}" for name in names)
        return {f"at {given}": float(value)}

    return measured


def random_extrapolation():
    b = random_batch()
    b.lam = 0.3 + 3 * torch.rand(()).item()
    return b


def random_gradients():
    """Weights, and the products a, b, g of two random gradients."""
    correct, incorrect = torch.randn(2, 4).tolist()
    products = [
        sum(x * y for x, y in zip(*pair)) for pair in ((correct, correct), (incorrect, incorrect), (correct, incorrect))
    ]
    return dict(zip(("c_w", "c_l", "a", "b", "g"), [*(0.2 + torch.rand(2)).tolist(), *products]))


def random_pair():
    """Log-ratios of a pair, and DPO's β."""
    w, lost, beta = torch.rand(3).tolist()
    return {"logratio_w": 4 * w - 3, "logratio_l": 4 * w - 4 - 4 * lost, "beta": 0.05 + 0.2 * beta}


# --- right answers and usual mistakes


def pi_bar(logps, mask):
    return (logps.sum(-1) / mask[:, 1:].sum(-1)).exp()


def change_of_correct(c_w, c_l, a, b, g):
    return c_w * a - c_l * g


def dpo_brake(logratio_w, logratio_l, beta):
    return beta / (1 + math.exp(-beta * (logratio_l - logratio_w)))


def loss_with(weight=None, reward=lambda r: r, divided=True, mean=True):
    """An Off-RL or an FPA loss with one thing done differently: its weight, its reward, its 1 / |y|, or its mean over rows."""

    def loss(logits, *given):
        ref_logits, (tokens, mask, r, *lam) = (given[0], given[1:]) if given[0].ndim == 3 else (None, given)
        length, logp_sum = mask.sum(-1), token_logps(logits, tokens, mask).sum(-1)
        b = SimpleNamespace(logits=logits, ref=ref_logits, tokens=tokens, mask=mask, length=length, lam=(lam or [2.0])[0])
        rows = reward(r) * weight(b) * (logp_sum / length if divided else logp_sum)
        return -(rows.mean() if mean else rows.sum())

    return loss


def of(logits, b, power=1.0):
    """π̄ of a batch's rows under some logits."""
    return (token_logps(logits, b.tokens, b.mask).sum(-1) * power / b.length).exp()


def extrapolated(b, away=1.0, kept=1.0):
    """h + λ (h - h_ref), with its gradient; `away` and `kept` change a sign or drop the first h for h_ref."""
    return (b.logits if kept else b.ref) + away * b.lam * (b.logits - b.ref)


def future_surrogate(logits, ref_logits, tokens, mask, reward, lam=2.0):
    """Off-RL's surrogate without log-probabilities, of the future policy."""
    b = SimpleNamespace(logits=logits, ref=ref_logits, tokens=tokens, mask=mask, length=mask.sum(-1), lam=lam)
    return -(reward * of(extrapolated(b), b)).mean()


def mistakes_of(seen):
    """The mistakes that both losses share: {hint: loss}. The right weight is π̄ under the logits seen(b)."""

    def weight(b):
        return of(seen(b).detach(), b)

    def summed(b):
        return token_logps(seen(b).detach(), b.tokens, b.mask).sum(-1)

    return {
        "the weight is not detached, so that its own gradient is added": loss_with(lambda b: of(seen(b), b)),
        "the weight is exp of the sum; divide the sum by |y| first, or a long answer has no weight": loss_with(
            lambda b: summed(b).exp()
        ),
        "the gradient of logp_sum has to be divided by |y| too": loss_with(weight, divided=False),
        "take the mean over rows, not the sum": loss_with(weight, mean=False),
        "the sign is turned round: a loss is minimised, so correct rows need a minus": loss_with(weight, lambda r: -r),
        "the incorrect rows are raised: multiply by the reward": loss_with(weight, torch.ones_like),
        "the incorrect rows are left out: the reward is +1 or -1, not 1 or 0": loss_with(weight, lambda r: r.clamp(min=0)),
        "no row is weighted: this is REINFORCE": loss_with(lambda b: 1.0),
        "divide by the number of the completion's tokens, not by the width of the batch": loss_with(
            lambda b: (summed(b) / b.mask.shape[1]).exp()
        ),
    }


MISTAKES = {
    "pi_bar": {
        "divide by the number of the completion's tokens, not by the width": lambda logps, mask: logps.mean(-1).exp(),
        "this is the probability of the whole answer: divide by |y| before exp": lambda logps, mask: logps.sum(-1).exp(),
        "take the mean of the log-probabilities, then exp, not the mean of probabilities": lambda logps, mask: (
            (logps.exp() * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)
        ),
        "exp is missing: this is logp_mean": lambda logps, mask: logps.sum(-1) / mask[:, 1:].sum(-1),
    },
    "off_rl_loss": mistakes_of(lambda b: b.logits),
    "change_of_correct": {
        "the incorrect row is pushed down, so its part has a minus": lambda c_w, c_l, a, b, g: c_w * a + c_l * g,
        "b says what the incorrect row does to itself; g says what it does to the correct one": (
            lambda c_w, c_l, a, b, g: c_w * a - c_l * b
        ),
        "the weights are swapped": lambda c_w, c_l, a, b, g: c_l * a - c_w * g,
        "each row has its own weight": lambda c_w, c_l, a, b, g: a - g,
    },
    "future_logits": {
        "the extrapolation starts at h, not at h_ref: add λ (h - h_ref) to h": lambda h, ref, lam: ref + lam * (h - ref),
        "this goes back to the base model: the difference is h - h_ref": lambda h, ref, lam: h - lam * (h - ref),
        "this adds the two: the base model's part is -λ h_ref": lambda h, ref, lam: (1 + lam) * h + lam * ref,
        "h and h_ref are swapped": lambda h, ref, lam: ref + lam * (ref - h),
        "this is the present policy: λ is not used": lambda h, ref, lam: h,
    },
    "fpa_loss": {
        "this is Off-RL: the weight has to come from the future policy": loss_with(lambda b: of(b.logits.detach(), b)),
        **mistakes_of(lambda b: extrapolated(b)),
        "the future policy goes back to the base model: h + λ (h - h_ref)": loss_with(
            lambda b: of(extrapolated(b, away=-1.0).detach(), b)
        ),
        "the extrapolation starts at h, not at h_ref": loss_with(lambda b: of(extrapolated(b, kept=0.0).detach(), b)),
        "this raises the present weight to a power; extrapolate the logits instead": loss_with(
            lambda b: of(b.logits.detach(), b, power=1 + b.lam)
        ),
        "h and h_ref are swapped: future_logits(logits, ref_logits, lam)": loss_with(
            lambda b: of(extrapolated(b, away=-1.0, kept=0.0).detach(), b)
        ),
        "only the weight looks ahead; logp_mean stays the present policy's": future_surrogate,
    },
    "dpo_brake": {
        "the brake has to fall when the incorrect row falls: Δ_l - Δ_w": lambda w, x, beta: dpo_brake(x, w, beta),
        "a factor β is missing outside": lambda w, x, beta: dpo_brake(w, x, beta) / beta,
        "a factor β is missing inside": lambda w, x, beta: beta * dpo_brake(w, x, 1.0),
        "this is the loss; its brake is β σ(β(Δ_l - Δ_w))": lambda w, x, beta: math.log1p(math.exp(beta * (x - w))),
        "both factors β are missing": lambda w, x, beta: dpo_brake(w, x, 1.0),
    },
}  # fmt: skip


# --- the lab, and the table


def verify_faults(answer):
    """{letter: fault}, every one of faults.FAULTS once. Says of one wrong letter what to look at."""
    if not isinstance(answer, dict) or set(answer) != set(faults.KEY):
        raise Wrong(f"this must be a dict with the keys {', '.join(faults.KEY)}")
    if empty := [letter for letter, word in answer.items() if word is ... or word is None]:
        raise Wrong(f"run {empty[0]} is not filled in yet")
    if unknown := [word for word in answer.values() if word not in faults.FAULTS]:
        raise Wrong(f"{unknown[0]!r} is none of {', '.join(faults.FAULTS)}")
    for letter, fault in faults.KEY.items():
        if answer[letter] != fault:
            raise Wrong(f"run {letter}: expected another fault, got {answer[letter]}\nhint: {faults.FAULTS[fault].look}")


def exercise(name, points, minutes, difficulty, right, draw, measured):
    return Exercise(points, minutes, difficulty, compared(name, right, draw, measured))


EXERCISES = {
    "pi_bar": exercise("pi_bar", 10, 4, "easy", pi_bar, random_batch, measured_pi_bar),
    "off_rl_loss": exercise("off_rl_loss", 20, 8, "medium", off_rl_loss, random_batch, weights_off_rl),
    "change_of_correct": exercise("change_of_correct", 10, 4, "medium", change_of_correct, random_gradients,
        measured_scalar("c_w", "c_l", "a", "b", "g")),
    "future_logits": exercise("future_logits", 10, 3, "easy", future_logits, random_extrapolation, measured_future),
    "fpa_loss": exercise("fpa_loss", 20, 8, "medium", fpa_loss, random_batch, weights_fpa),
    "dpo_brake": exercise("dpo_brake", 10, 4, "easy", dpo_brake, random_pair,
        measured_scalar("logratio_w", "logratio_l", "beta")),
    "find_the_bug": Exercise(20, 12, "hard", verify_faults),
}  # fmt: skip
