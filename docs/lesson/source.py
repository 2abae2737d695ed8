# ruff: noqa: E402, E501, F401
# %% [markdown]
# # Offline reinforcement learning on right and wrong sums
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPOSITORY/blob/main/lesson.ipynb)
#
# The lesson takes ninety minutes and some homework. It has seven exercises, and you train two policies with losses that you
# write. Each question goes the same way: **write a guess down, run, compare, say why.** The cells with `...` are yours. Each
# exercise names its difficulty, its minutes and its points, and the check under it says what is wrong. Read the README
# afterwards: it gives some of the guesses away.
#
# You need PyTorch, and gradients of a log-probability. You need no reinforcement learning, and no GPU.
#
# | symbol | meaning |
# |---|---|
# | x, y, \|y\| | a problem, an answer to it, and the answer's number of tokens |
# | r, `reward` | +1 for a correct answer, −1 for an incorrect one |
# | π_ref, π_θ | the base model, frozen, which sampled the answers; the policy, which is trained |
# | `logp_sum`, `logp_mean` | log π(y\|x), summed over the answer's tokens, and divided by \|y\| |
# | π̄ | exp(logp_mean): the answer's probability per token |
# | C | a loss's coefficient: its gradient is −r C ∇ logp_sum. C·\|y\| is the weight of ∇ logp_mean |
# | log-ratio | `logp_sum` under π_θ minus `logp_sum` under π_ref, in nats |

# %%
# On Colab this fetches the repository and what it needs. Elsewhere it only finds the repository's folder.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("losses.py"):
    if not os.path.exists("lesson"):
        subprocess.run(["git", "clone", "-q", "https://github.com/OWNER/REPOSITORY", "lesson"], check=True)
    os.chdir("lesson")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], check=True)
while not os.path.exists("losses.py"):
    assert os.getcwd() != os.path.dirname(os.getcwd()), "start this notebook from the repository's folder"
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import math

import matplotlib.pyplot as plt
import torch

import plots
from losses import token_logps
from study import faults, figures, lesson
from study.exercises import check
from study.lesson import compare, guessed, solved
from study.results import by_method, forecast_by_step, fpa_runs, label, where

# %matplotlib inline
world = lesson.world()  # the base model and its rollouts, which ship with the repository
runs = lesson.stored()  # the committed runs: five seeds of each method
print({label(method): len(some) for method, some in by_method(runs).items()})

# %% [markdown]
# ## 1. What does the base model get wrong? (10 min)
#
# A problem is a two-digit start and six operations from left to right, all mod 100. The base model has imitated traces with
# a habit: where + or − with a digit of 7, 8 or 9 needs a carry or a borrow, they mostly forget it. It has answered each of 1,024 problems eight times, and each answer was
# checked. These *rollouts* are all the data that there will be. Here are two answers to one problem.

# %%
pair = lesson.pair_of(world)
problem, (correct, incorrect), first = lesson.texts_of(world, pair)
print(problem)
print(f"correct    {correct}")
print(f"incorrect  {incorrect}")
print(f"{'':11}{' ' * first}^ the first wrong token")

# %% [markdown]
# **Guess.** Take a token of an incorrect answer. How often does some correct answer to the same problem have this token at
# this place? A share from 0 to 1.

# %%
# BEGIN SOLUTION
shared_guess = 0.5
# END SOLUTION shared_guess = ...

# %%
if guessed(shared_guess):
    compare(shared_guess, world.measured["shared_tokens"], "share of an incorrect answer's tokens")

# %% [markdown]
# **Say why** this matters to a method that pushes incorrect answers down.
#
# BEGIN SOLUTION
# *Most of what is pushed down is right: the push also moves tokens that correct answers need.*
# END SOLUTION *Your sentence:*

# %%
print(token_logps.__doc__)  # the one helper that you need: from logits to log-probabilities of tokens

# %% [markdown]
# **Exercise `pi_bar`** · easy · 4 min · 10 points. Turn the log-probabilities of tokens into the answer's probability per token.
# `logps` (B, T−1) is `token_logps(logits, tokens, mask)`: entry t is the log-probability of token t+1, and 0 where that token
# is not the answer's. `mask` (B, T) is True on the answer's tokens, and False at position 0. Return (B,).


# %%
def pi_bar(logps, mask):
    # BEGIN SOLUTION
    return (logps.sum(-1) / mask.sum(-1)).exp()
    # END SOLUTION return ...  # your code


check("pi_bar", pi_bar)

# %% [markdown]
# ## 2. What does plain offline RL do? (18 min)
#
# Off-RL raises π̄ of correct answers and lowers π̄ of incorrect ones: it maximises the mean of r π̄. Its gradient weights ∇
# logp_mean by π̄:
#
# $$\nabla\, r \bar\pi = r\, \bar\pi\, \nabla \log\bar\pi$$
#
# So one can write the weight out, detach it, and get the same gradient from minus the mean over rows of r · sg[π̄] · logp_mean,
# where sg is `.detach()`. The check accepts both forms. Write the second one: FPA will change this weight, and nothing else.
#
# **Exercise `off_rl_loss`** · medium · 8 min · 20 points. `logits` (B, T, V) as the model gave them for `tokens` (B, T),
# `mask` as above, `reward` (B,) of +1 and −1. Use `token_logps`. Return a scalar to minimise.


# %%
def off_rl_loss(logits, tokens, mask, reward):
    # BEGIN SOLUTION
    logps = token_logps(logits, tokens, mask)
    logp_mean = logps.sum(-1) / mask.sum(-1)
    return -(reward * pi_bar(logps, mask).detach() * logp_mean).mean()
    # END SOLUTION return ...  # your code


off_rl_is_right = check("off_rl_loss", off_rl_loss)

# %% [markdown]
# Now train with it: 200 steps of 64 rows, half of them correct. `lesson.train_with` is the loop: the rows, the optimizer and
# the evaluations of `python train.py`.
#
# **Guess.** The base model solves 0.46 of the validation problems. What will it be after 200 steps? And which share of the
# *correct* answers that it trains on will have *lost* probability?

# %%
# BEGIN SOLUTION
accuracy_guess, fallen_guess = 0.6, 0.1
# END SOLUTION accuracy_guess, fallen_guess = ..., ...

# %%
own = {}
if solved(off_rl_is_right) and guessed(accuracy_guess, fallen_guess):
    own["my Off-RL"] = lesson.train_with(  # a loss is given ref_logits too, which Off-RL does not use
        lambda logits, ref_logits, *rest: off_rl_loss(logits, *rest), world
    )
    compare(accuracy_guess, own["my Off-RL"]["accuracy"][-1], "accuracy after 200 steps")
    compare(fallen_guess, own["my Off-RL"]["logratio_correct_below_0"][-1], "share of correct rows below 0")

# %% [markdown]
# The figure shows your run in black, on the axes of the five stored seeds. It has the rows of one of these seeds, so it should lie on one of
# the lines at steps 100 and 200.

# %%
if guessed(accuracy_guess, fallen_guess):
    lesson.figure_own(runs, own, losses=("off_rl",))
    plt.show()

# %% [markdown]
# The mean hides how it falls. Here is the distribution of the correct rows' log-ratios: it is a heavy tail.

# %%
if guessed(accuracy_guess, fallen_guess):
    figure, _ = plots.figure_drag(where(runs, loss="off_rl"))
    plt.show()

# %% [markdown]
# **Say why** a training that looks only at its loss would not notice. (Print `own["my Off-RL"]["loss"]`. It is a
# mean over the steps since the last evaluation, so it is nan before the first step.)
#
# BEGIN SOLUTION
# *The loss falls. Its value is a weighted sum of log-probabilities, and pushing incorrect rows down lowers it, whatever happens
# to the accuracy. In the detached form an incorrect row adds π̄ log π̄. This falls until π̄ is 1/e, about 0.37, and rises again.*
# END SOLUTION *Your sentence:*

# %% [markdown]
# ## 3. What does a push do to a correct answer? (17 min)
#
# Take one small step of Off-RL on the **incorrect** answer of the pair alone, and look at the tokens of the **correct** one.
# Do it twice: from the base model, and from a policy that 300 steps of Off-RL have moved.
#
# **Guess**, `"rises"` or `"falls"`, what the correct answer as a whole does in the first case and in the second. The 300 steps
# take about a minute.

# %%
# BEGIN SOLUTION
base_guess, later_guess = "falls", "falls"
# END SOLUTION base_guess, later_guess = ..., ...

# %%
if guessed(base_guess, later_guess):
    later, batches = lesson.walk(world)  # 300 steps of Off-RL; some of them are looked at below
    policies = {"the base model": world.base, "step 300": later}
    lesson.figure_step(world, policies, pair)
    plt.show()
    for (name, policy), guess in zip(policies.items(), (base_guess, later_guess)):
        compare(guess, "rises" if lesson.push(world, policy, pair).sum() > 0 else "falls", f"from {name}")
        rising = sum(lesson.push(world, policy, some).sum() > 0 for some in lesson.some_pairs(world))
        print(f"   of 32 pairs, the correct answer rises in {rising}")

# %% [markdown]
# At first the push *helps*: what the wrong token loses, the right one gains. Later there is little left to take from the wrong
# token, and the push takes from tokens that both answers have at the same place.
#
# **Exercise `change_of_correct`** · medium · 4 min · 10 points. A step on both rows of a pair moves the parameters along
#
# $$C_w \nabla \log\pi(y_w) - C_l \nabla \log\pi(y_l)$$
#
# w is the correct row, l the incorrect one, and log π is `logp_sum`. Let a and b be the squared norms of the two gradients, and g
# their inner product. To first order, how much does log π(y_w) change in a step of size 1?


# %%
def change_of_correct(c_w, c_l, a, b, g):
    # BEGIN SOLUTION
    return c_w * a - c_l * g
    # END SOLUTION return ...  # your code


change_is_right = check("change_of_correct", change_of_correct)

# %% [markdown]
# The stored runs have measured a, b, g and C_w·a − C_l·g on 32 pairs: orange Off-RL, blue FPA, which comes next.

# %%
off_rl = where(runs, loss="off_rl")
if solved(change_is_right):
    figure, _ = figures.figure_entanglement(runs)
    plt.show()
    below = [run.tables["entanglement"]["share_net_below_0"].mean() for run in off_rl]
    share = sum(below) / len(below)
    print(f"Off-RL: a step on a pair lowers its correct row in {share:.0%} of the pairs, over all steps and seeds")

# %% [markdown]
# So a step on a pair mostly *raises* its correct row, at every evaluation, and yet the correct rows fall. That looks like a
# contradiction. But a batch has 32 incorrect rows of other problems, and these evaluations are 100 steps apart.
# `lesson.walk` looked more often: what do a batch's correct rows add to the log-probability of correct rows of *other*
# problems, what do its incorrect rows take away, and what did the optimizer's step then do to them?
#
# **Guess** the step at which correct rows of other problems fall fastest, from 0 to 100.

# %%
# BEGIN SOLUTION
fastest_guess = 50
# END SOLUTION fastest_guess = ...

# %%
if guessed(base_guess, later_guess, fastest_guess):
    lesson.figure_batch(batches)
    plt.show()
    compare(fastest_guess, lesson.fastest_fall(batches), "step of the fastest fall")
    lesson.print_batches(batches)

# %% [markdown]
# **Say why**: which incorrect rows pull a correct answer down, and when?
#
# BEGIN SOLUTION
# *Those of other problems, from about step 20 on. Before, the push takes from wrong tokens, and it helps. Once these are gone it
# takes from what all answers share, the format and the arithmetic. From step 20 to 40 it is the stronger push at every step that
# was measured, and later it is so at times. The change lags behind the push, because AdamW steps along a running mean of
# gradients. The pairs of the figure above show none of this.*
# END SOLUTION *Your sentence:*

# %% [markdown]
# ## 4. How does FPA brake? (20 min)
#
# What counts is C_l against C_w. Off-RL's weight π̄ falls only as fast as the answer does. Future Policy Approximation asks
# how probable the answer *will* be if the policy goes on as it has gone so far. h are the policy's logits, and h_ref the base
# model's. The *future policy* is π̂ = softmax(ĥ), with ĥ = h + λ (h − h_ref).
#
# **Exercise `future_logits`** · easy · 3 min · 10 points. The logits have any shape. No gradient is needed.


# %%
def future_logits(logits, ref_logits, lam):
    # BEGIN SOLUTION
    return logits + lam * (logits - ref_logits)
    # END SOLUTION return ...  # your code


if check("future_logits", future_logits):
    ref, now = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for lam in (0.0, 1.0, 2.0, 10.0):  # four tokens; what has lost loses more
        print(f"λ = {lam:<4g}", future_logits(now, ref, lam).softmax(-1).numpy().round(3))

# %% [markdown]
# **Exercise `fpa_loss`** · medium · 8 min · 20 points. Change one thing of your `off_rl_loss`: the weight is π̄ under the
# future policy. The weight must have no gradient.


# %%
def fpa_loss(logits, ref_logits, tokens, mask, reward, lam=2.0):
    # BEGIN SOLUTION
    logp_mean = token_logps(logits, tokens, mask).sum(-1) / mask.sum(-1)
    future = future_logits(logits, ref_logits, lam)
    weight = pi_bar(token_logps(future, tokens, mask), mask).detach()
    return -(reward * weight * logp_mean).mean()
    # END SOLUTION return ...  # your code


fpa_is_right = check("fpa_loss", fpa_loss)

# %% [markdown]
# **Guess** the accuracy after 200 steps of FPA at λ = 2. It was 0.46 at the start.

# %%
# BEGIN SOLUTION
fpa_guess = 0.8
# END SOLUTION fpa_guess = ...

# %%
if guessed(fpa_guess):
    if solved(fpa_is_right):
        own["my FPA"] = lesson.train_with(fpa_loss, world)
        compare(fpa_guess, own["my FPA"]["accuracy"][-1], "accuracy after 200 steps of FPA")
    lesson.figure_own(runs, own)
    plt.show()

# %% [markdown]
# After 200 steps this seed of FPA is far above its start. But FPA drags correct answers too: on the stored seeds 0.34 to
# 0.67 of them are below 0 at step 100. Then FPA pushes the incorrect ones less. At the end the share is 0.12 to 0.24, and a tail
# stays far down. Why does it push less? AdamW divides a common scale of all weights out. What counts is the ratio of the two kinds
# of weight.
#
# **Guess.** In the first 100 steps, what is the mean weight C_l |y| over the mean weight C_w |y|, for Off-RL and for FPA?

# %%
# BEGIN SOLUTION
off_rl_ratio_guess, fpa_ratio_guess = 0.9, 0.5
# END SOLUTION off_rl_ratio_guess, fpa_ratio_guess = ..., ...

# %%
if guessed(off_rl_ratio_guess, fpa_ratio_guess):
    lesson.figure_ratio(runs)
    plt.show()
    for some, guess in ((off_rl, off_rl_ratio_guess), (fpa_runs(runs), fpa_ratio_guess)):
        ratios = [run.log["coefficient_incorrect"][1] / run.log["coefficient_correct"][1] for run in some]
        compare(guess, sum(ratios) / len(ratios), f"{label(some[0].method)}, mean C_l·|y| / mean C_w·|y|")
    for name, accuracy in lesson.ends(off_rl + fpa_runs(runs) + fpa_runs(runs, target="incorrect")).items():
        print(f"accuracy at the end: {accuracy:.2f}   {name}")

# %% [markdown]
# The line *incorrect only* is FPA whose correct rows keep Off-RL's weight. At step 100, 0.23 to 0.39 of its correct rows are
# below 0, fewer than FPA's on every seed. **Say why.** At the end its accuracy is higher by 0.05 ± 0.08, seed by seed. Is it better?
#
# BEGIN SOLUTION
# *FPA on both kinds also takes weight from correct rows that were dragged down, and these need it most. With the brake on
# incorrect rows only, the weight of correct rows stays near 1, and the ratio is the smaller one until about step 500. Whether it
# is better is not decided: the interval holds 0.*
# END SOLUTION *Your sentence:*

# %% [markdown]
# ## 5. Is it a forecast, and how is it related to DPO? (homework, 10 min)
#
# π̂ of step 80 at λ = 2 is meant to be the policy of step 240. A policy is near to it where KL(policy of step 240 ‖ this policy),
# the KL divergence, is small. It is a kind of distance, and a mean over tokens here. **Guess**, `"nearer"` or `"farther"`: is π̂
# of step 80 nearer to the policy of step 240 than π_θ of step 80 is? And at step 10, with the policy of step 30?

# %%
# BEGIN SOLUTION
at_80_guess, at_10_guess = "nearer", "nearer"
# END SOLUTION at_80_guess, at_10_guess = ..., ...

# %%
if guessed(at_80_guess, at_10_guess):
    ratios = forecast_by_step(fpa_runs(runs))
    for t, ratio in ratios.items():
        print(f"step {t:4} to {3 * t:4}: KL of π̂ over KL of π_θ {ratio:6.2f}   (below 1: π̂ is nearer)")
    for t, guess in ((80, at_80_guess), (10, at_10_guess)):
        compare(guess, "nearer" if ratios[t] < 1 else "farther", f"π̂ of step {t}")

# %% [markdown]
# So at this learning rate, 2e-4, π̂ is a forecast in the first steps only, and FPA gains after them too. At 2e-5 π̂ is a
# forecast up to step 160. At both rates FPA is a brake that tightens with the distance from the base model. DPO has such a
# brake too. Its gradient on a pair has the coefficient β σ(β(Δ_l − Δ_w)), where Δ is a log-ratio and σ the logistic function.
#
# **Exercise `dpo_brake`** · easy · 4 min · 10 points. Write this coefficient, of three numbers. Use `math.exp` or torch.


# %%
def dpo_brake(logratio_w, logratio_l, beta):
    # BEGIN SOLUTION
    return beta * torch.tensor(beta * (logratio_l - logratio_w)).sigmoid().item()
    # END SOLUTION return ...  # your code


if check("dpo_brake", dpo_brake):
    figure, brakes = lesson.figure_brakes(fpa_runs(runs)[0], dpo_brake)
    plt.show()
    print({name: round(values[1], 2) for name, values in brakes.items()}, "at step 100, as a share of the start")

# %% [markdown]
# The three brakes are of the same rows of the same run. **Say why** DPO's and FPA's differ in the first hundred steps.
#
# BEGIN SOLUTION
# *The scale differs. DPO's brake counts nats of a whole answer, times β = 0.1. FPA's counts nats per token, extrapolated. With
# β = 0.2 DPO's brake is 0.21 at step 100, and FPA's is 0.29. The correct rows play a small part. Most of them rise here, which
# tightens DPO's brake: it is 0.44, and 0.46 with Δ_w = 0. FPA looks at the incorrect row alone.*
# END SOLUTION *Your sentence:*

# %% [markdown]
# ## 6. Lab: find the bug (18 min)
#
# Four runs of FPA have one silent fault each. No run raises an error. A fifth run is right. The faults are
#
# - `not_detached`: the weight is not detached,
# - `no_length`: the weight is exp of the sum over tokens, without 1/|y|,
# - `wrong_sign`: incorrect rows are raised, as if they were correct,
# - `zero_one`: the reward is 1 or 0, so that incorrect rows are left out.
#
# First think what each of the faults would do to the log. Then look.

# %%
logs = faults.logs()
lesson.figure_logs(logs)
plt.show()
for name, log in logs.items():
    print(name)
    print(faults.table({column: log[column] for column in ("step", "loss", "grad_norm", "accuracy", "logratio_incorrect")}))

# %% [markdown]
# **Exercise `find_the_bug`** · hard · 12 min · 20 points. Name each run's fault from its log. Then read the code, with
# `print(faults.code("a"))` and so on, and correct yourself before you run the check.

# %%
# BEGIN SOLUTION
found = {"a": "not_detached", "b": "no_length", "c": "zero_one", "d": "wrong_sign"}
# END SOLUTION found = {"a": ..., "b": ..., "c": ..., "d": ...}

check("find_the_bug", found)

# %% [markdown]
# Runs a and b solve *more* problems than the right one after these 200 steps, 0.97 and 0.99, and all stored FPA runs are below
# that at step 200. On this task their faults act as stronger brakes. That is one seed and 200 steps, and nothing is known of
# these faults beyond. **Say why**, and what you would have concluded from the accuracy alone.
#
# BEGIN SOLUTION
# *The right run has dragged some of its correct rows down, and it goes on to recover: it ends at 0.91 at step 1,000. `no_length`
# weights a row by its whole probability, which is near 0 once the row has lost a few nats. `not_detached` turns the push round
# where logp_mean is below about −1/(1 + λ). Both brake harder. `zero_one` is fine-tuning on correct rows, and `wrong_sign`
# hardly moves. From the accuracy alone I would have kept a bug. These are one seed and 200 steps.*
# END SOLUTION *Your sentence:*

# %% [markdown]
# ## 7. What collapses at 2e-4, and why? (4 min)
#
# Answer in two sentences. Name your own curve as evidence.
#
# BEGIN SOLUTION
# *In my Off-RL run the accuracy falls to less than half of its start within 200 steps, and most of the correct answers
# that it trains on lose probability. Incorrect answers are pushed down with a weight that falls only as they fall, and what
# they share with correct answers, of this problem and of others, is pushed down with them.*
# END SOLUTION *Your two sentences:*
#
# ## Open task: a brake of your own
#
# Difficulty: open. A brake is a function of π̄ and π̄_ref of the incorrect rows. Write one into a file `my_brake.py`,
# such as this one of docs/lesson:
#
# ```python
# def brake(pi, pi_ref):
#     return pi * (pi / pi_ref) ** 2
# ```
#
# Then `python -m study.leaderboard my_brake.py` trains it on five seeds and prints its row beside the stored ones. The brake
# to beat is *FPA, λ = 2, incorrect only*: the 95 % interval of the difference, seed by seed, has to be above 0. This is like
# for like, because correct rows keep Off-RL's weight under your brake too. Try `--steps 200` first, and
# `--seed 0`, which trains one run. One seed has no interval.
#
# The base models of the five seeds ship with the repository. The first run samples the rollouts of four of them.
#
# Can a brake that does not look at π̄_ref do it? What does a constant one do (`return torch.full_like(pi, 0.25)`)?
