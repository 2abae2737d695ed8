"""diagnostics.py against autograd, hand-worked distances and a policy that drifts in a straight line."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from losses import LOSSES, objective, token_logps
from study import diagnostics, results
from toy_math import stages
from toy_math.problems import draw_problems
from toy_math.rollouts import pack


def tiny_data(policies=1):
    """Models with random weights, the first the reference, and two pairs of traces of one operation each."""
    torch.manual_seed(0)
    models = [stages.GPT(stages.CONFIG) for _ in range(1 + policies)]
    problems = draw_problems(2, 1, "train", random.Random(0))
    texts = ["1+1=2;#2", "1+1=3;#3", "2*4=08;#08", "2*4=09;#09"]
    rows = [{"prompt": problems[i // 2].prompt, "completion": text, "finished": True} for i, text in enumerate(texts)]
    tokens, mask = pack(rows)
    start = len(rows[0]["prompt"])
    with torch.no_grad():
        ref_logits = models[0](tokens)[:, start:]
    reward, clean = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([True, False, False, False])
    ids = torch.tensor([0, 0, 1, 1])
    return models, stages.Rollouts(tokens, mask, start, ref_logits, reward=reward, clean=clean, problem_ids=ids)


def test_entanglement_is_that_of_the_whole_gradients():
    (_, model), data = tiny_data()
    gradients = []
    for row in range(4):
        inputs = data.inputs[row : row + 1]
        mask = torch.zeros_like(inputs, dtype=torch.bool)
        mask[:, data.start :] = data.mask[row]
        model.zero_grad()
        token_logps(model(inputs), inputs, mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    pairs = [(gradients[0], gradients[1]), (gradients[2], gradients[3])]
    measured = diagnostics.entanglement(model, data, torch.tensor([[0, 1], [2, 3]]), run_of("off_rl"), train.add_logps)
    length = data.length.float()
    weight = (token_logps(model(data.inputs, data.start), data.tokens, data.mask).sum(-1) / length).exp() / length  # Off-RL's C
    net = [(weight[2 * i] * w @ w - weight[2 * i + 1] * w @ incorrect).item() for i, (w, incorrect) in enumerate(pairs)]
    expected = {
        "a": np.mean([(correct @ correct).item() for correct, _ in pairs]),
        "b": np.mean([(incorrect @ incorrect).item() for _, incorrect in pairs]),
        "g": np.mean([(correct @ incorrect).item() for correct, incorrect in pairs]),
        "cosine": np.mean([torch.cosine_similarity(*pair, dim=0).item() for pair in pairs]),
        "share_g_above_a": np.mean([(correct @ incorrect > correct @ correct).item() for correct, incorrect in pairs]),
        "net": np.mean(net),
        "share_net_below_0": np.mean([value < 0 for value in net]),
    }
    assert measured == pytest.approx(expected, rel=1e-4)


def run_of(loss, lam=0.0):
    return SimpleNamespace(**{"target": "both", "seed": 0, **LOSSES[loss].defaults, "loss": loss, "lam": lam})


@torch.no_grad()
def exact_logp(model, b):
    """The correct row's logp_sum, in double precision, which a finite difference needs."""
    logps = model(b.inputs[:1], b.start)[0, :-1].log_softmax(-1)
    return logps.gather(-1, b.tokens[0, 1:, None])[b.mask[0, 1:]].sum().item()


@pytest.mark.parametrize(
    ("loss", "lam"), [("off_rl", 0.0), ("fpa", 2.0), ("dpo", 0.0), ("dpo", 2.0), ("rpo", 0.0), ("sft", 0.0), ("reinforce", 0.0)]
)
def test_net_is_what_a_small_step_does_to_the_correct_answer(loss, lam):
    """Against the finite difference of a step of plain gradient descent on each pair, with autograd's own gradient."""
    (_, model), data = tiny_data()
    model, run = model.double(), run_of(loss, lam)
    data.columns["ref_logits"] = data.ref_logits.double()
    changes, lr = [], 1e-6
    for pair in torch.tensor([[0, 1], [2, 3]]):
        stepped, b = copy.deepcopy(model), data[pair]
        before = exact_logp(stepped, b)
        train.add_logps(stepped, b, lam)
        rows = 1 if LOSSES[loss].pairs else 2  # objective is a mean over pairs or rows; net is of the pair's sum
        (rows * objective(b, run)[0]).backward()
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter -= lr * parameter.grad
        changes.append((exact_logp(stepped, b) - before) / lr)
    measured = diagnostics.entanglement(model, data, torch.tensor([[0, 1], [2, 3]]), run, train.add_logps)
    assert measured["net"] == pytest.approx(np.mean(changes), rel=1e-2)
    assert measured["share_net_below_0"] == np.mean([change < 0 for change in changes])


@pytest.mark.parametrize(("loss", "lam"), [("off_rl", 0.0), ("fpa", 2.0), ("sft", 0.0), ("topr", 0.0)])
def test_up_and_down_are_what_the_batchs_two_kinds_of_rows_do_to_its_correct_ones(loss, lam):
    """And to another row. Against the finite difference of a step on one kind of rows alone, with autograd's own gradient."""
    (_, model), data = tiny_data()
    model, run, pairs, others = model.double(), run_of(loss, lam), torch.tensor([[0, 1], [2, 3]]), torch.tensor([3])
    data.columns["ref_logits"] = data.ref_logits.double()
    data.columns["ref_logp_sum"] = data.ref_logp_sum.double()
    measured, lr = diagnostics.batch_gradients(model, data, pairs, others, run, train.add_logps), 1e-6
    for kind, sign, rows in (("up", 1, [0, 2]), ("down", -1, [1, 3])):
        stepped, b = copy.deepcopy(model), data[torch.tensor(rows)]
        correct = [data[pairs[i]] for i in range(2)]
        before = sum(exact_logp(stepped, some) for some in correct) / 2, exact_logp(stepped, data[others])
        train.add_logps(stepped, b, lam)
        (objective(b, run)[0] / 2).backward()  # a mean over two of the batch's four rows
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter -= lr * parameter.grad if parameter.grad is not None else 0
        after = sum(exact_logp(stepped, some) for some in correct) / 2, exact_logp(stepped, data[others])
        for name, first, last in zip((kind, f"{kind}_others"), before, after):
            assert measured[name] == pytest.approx(sign * (last - first) / lr, rel=1e-2, abs=1e-6)
        train.add_logps(model, b, lam)
        weight = (objective(b, run)[1] * b.length).mean().item()
        assert measured[f"coefficient_{'correct' if kind == 'up' else 'incorrect'}"] == pytest.approx(weight, rel=1e-5)


def test_straightness_by_hand():
    """A two-token vocabulary, whose token 0 has the log-probabilities that are asked for."""
    b = SimpleNamespace(tokens=torch.tensor([[0, 0]]), mask=torch.tensor([[False, True]]))

    def snapshots(logps):
        p = torch.tensor(logps).exp()
        return {10 * (i + 1): torch.stack([x.log(), (1 - x).log()])[None, None].expand(1, 2, 2) for i, x in enumerate(p)}

    assert diagnostics.straightness(snapshots([-1.0, -2.0, -3.0, -4.0]), 40, b) == pytest.approx(1, abs=1e-6)
    bent = snapshots([-1.0, -3.0, -1.0, -3.0])  # slope -0.4 a snapshot: 1 - (4 - 0.8) / 4
    assert diagnostics.straightness(bent, 40, b) == pytest.approx(0.2, abs=1e-5)
    assert diagnostics.straightness(bent, 30, b) == pytest.approx(0, abs=1e-5) and np.isnan(
        diagnostics.straightness(bent, 20, b)
    )


def test_a_loss_whose_inputs_only_training_has_gets_nan():
    (_, model), data = tiny_data()
    measured = diagnostics.entanglement(model, data, torch.tensor([[0, 1]]), run_of("kto"), train.add_logps)
    assert np.isnan(measured["net"]) and np.isnan(measured["share_net_below_0"]) and measured["a"] > 0


def test_tokens_and_the_first_wrong_one(tmp_path):
    (_, model), data = tiny_data()
    observe = diagnostics.Observer(model, data, run_of("fpa", 2.0), tmp_path, train.add_logps)
    observe.token_pairs = torch.tensor([[0, 1], [2, 3]])
    rows = observe.tokens()
    assert [(row["pair"], row["side"], row["first_wrong"]) for row in rows] == [
        (0, "correct", 4), (0, "incorrect", 4), (1, "correct", 5), (1, "incorrect", 5)
    ]  # fmt: skip
    assert [len(row["tokens"].split()) for row in rows] == [9, 9, 11, 11]
    with torch.no_grad():
        logits = model(data.inputs)[:, data.start :]
    futures = {lam: (1 + lam) * logits - lam * data.ref_logits for lam in diagnostics.TOKEN_LAMS}
    expected = {"ref_logps": data.ref_logits, **{f"future_logps_{lam}": future for lam, future in futures.items()}}
    expected = {name: token_logps(some, data.tokens, data.mask) for name, some in expected.items()}
    expected["logratios"] = token_logps(logits, data.tokens, data.mask) - expected["ref_logps"]
    for i, row in enumerate(rows):
        for name, values in expected.items():
            kept = values[i, : len(row["tokens"].split())].tolist()
            assert [float(text) for text in row[name].split()] == pytest.approx(kept, abs=1e-3 if name[0] in "lr" else 6e-3)


def test_distances_by_hand():
    tokens, mask = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[False, True], [False, True]])
    p = torch.tensor([0.25, 0.75]).log().expand(2, 2, 2)
    q = torch.tensor([0.5, 0.5]).log().expand(2, 2, 2)
    got = diagnostics.distances(q, p, tokens, mask, mask.sum(-1))
    assert got["kl"] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))  # KL of the later one from the future one
    assert got["tv"] == pytest.approx(0.25)
    assert got["token_error"] == pytest.approx((np.log(1.5) + np.log(2)) / 2)
    assert got["coefficient_error"] == pytest.approx(0.25)


def test_coefficient_rank_is_spearmans():
    tokens, mask = torch.zeros(4, 2, dtype=torch.long), torch.tensor([[False, True]] * 4)
    p, q = (
        torch.stack([torch.tensor(values), torch.zeros(4)], dim=-1)[:, None].expand(4, 2, 2)
        for values in ([2.0, 3.0, 1.0, 4.0], [2.0, 1.0, 3.0, 4.0])
    )
    rank = diagnostics.distances(p, q, tokens, mask, mask.sum(-1))["coefficient_rank"]
    assert rank == pytest.approx(1 - 6 * (2**2 + 2**2) / (4 * 15))


def test_a_straight_drift_is_forecast_exactly():
    _, data = tiny_data()
    velocity = torch.randn(data.ref_logits.shape, generator=torch.Generator().manual_seed(0))
    snapshots = {t: data.ref_logits + t * velocity / 100 for t in (10, 20, 30)}
    rows = [row for later in snapshots for row in diagnostics.extrapolation(snapshots, later, data[torch.arange(4)])]
    assert {(row["t"], row["later"]) for row in rows} == {(10, 20), (10, 30), (20, 30)}
    by_key = {(row["t"], row["later"], row["lam"]): row for row in rows}
    for t, later, lam in ((10, 20, 1), (10, 30, 2), (20, 30, 0.5)):  # t' = (1 + lam) t
        assert by_key[t, later, lam]["kl"] == pytest.approx(0, abs=1e-5) and by_key[t, later, 0]["kl"] > 1e-3
        assert by_key[t, later, lam]["coefficient_rank"] == pytest.approx(1)


def test_the_other_rows_are_correct_ones_of_other_problems_spread_over_all(tmp_path):
    ids = torch.arange(200).repeat_interleave(4)
    rollouts = SimpleNamespace(reward=torch.tensor([1.0, 1.0, -1.0, -1.0] * 200), problem_ids=ids, clean=ids > 0)
    observe = diagnostics.Observer(None, rollouts, run_of("fpa", 2.0), tmp_path, None)
    others = ids[observe.others]
    assert len(others) == diagnostics.PAIRS and (rollouts.reward[observe.others] > 0).all()
    assert not set(others.tolist()) & set(ids[observe.pairs].flatten().tolist())
    assert others.min() < 20 and others.max() > 150


def test_the_observer_writes_what_the_figures_read(tmp_path, monkeypatch):
    (reference, model), data = tiny_data()
    model.load_state_dict(reference.state_dict())
    observe = diagnostics.Observer(model, data, run_of("fpa", 2.0), tmp_path, train.add_logps)
    assert {tuple(pair) for pair in observe.pairs.tolist()} == {(0, 1), (2, 3)}
    monkeypatch.setattr(diagnostics, "EARLY", 8)
    monkeypatch.setattr(diagnostics, "LATER", 5)
    for step in range(21):
        observe(step, step % 10 == 0)
        with torch.no_grad():
            model.norm.weight.add_(0.01)
    entangled = results.read_csv(tmp_path / "entanglement.csv")
    assert entangled["step"].tolist() == [0, 10, 20] and len(set(entangled["a"])) == 3
    batch = results.read_csv(tmp_path / "batch.csv")
    assert batch["step"].tolist() == [*range(8), 10, 15, 20] and len(set(batch["down"])) == len(batch["down"])
    assert not batch["up_others"].any() and not len(observe.others)  # there is no third problem
    run = results.Run(tmp_path, {}, {}, {"extrapolation": results.read_csv(tmp_path / "extrapolation.csv")})
    pairs = results.extrapolated(run)
    assert set(pairs) == {(t, later, lam) for t, later in ((10, 15), (10, 20), (15, 20)) for lam in diagnostics.LAMS}
    future, present = pairs[10, 20, 1]
    assert future < present  # the weights drift in a straight line, so the logits nearly do
    tokens = results.read_csv(tmp_path / "tokens.csv")
    # the other pair's correct side is not clean, so its first difference might not be the first wrong token
    count = observe.pairs.tolist().count([0, 1])
    assert observe.token_pairs.tolist() == [[0, 1]] * count and 0 < count < diagnostics.PAIRS
    assert tokens["step"].tolist() == [step for step in (0, 10, 20) for _ in range(2 * count)]
    assert tokens["side"][:2].tolist() == ["correct", "incorrect"]
