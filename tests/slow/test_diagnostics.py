"""diagnostics.py against autograd, hand-worked distances and a policy that drifts in a straight line."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from losses import token_logps
from study import diagnostics, results
from toy_math import stages
from toy_math.rollouts import pack


def tiny_data(policies=1):
    """Models with random weights, the first the reference, and two pairs of traces of one operation each."""
    torch.manual_seed(0)
    models = [stages.GPT(stages.CONFIG) for _ in range(1 + policies)]
    problems = stages.draw_problems(2, 1, "train", random.Random(0))
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
    measured = diagnostics.entanglement(model, data, torch.tensor([[0, 1], [2, 3]]))
    expected = {
        "a": np.mean([(correct @ correct).item() for correct, _ in pairs]),
        "b": np.mean([(incorrect @ incorrect).item() for _, incorrect in pairs]),
        "g": np.mean([(correct @ incorrect).item() for correct, incorrect in pairs]),
        "cosine": np.mean([torch.cosine_similarity(*pair, dim=0).item() for pair in pairs]),
        "share_g_above_a": np.mean([(correct @ incorrect > correct @ correct).item() for correct, incorrect in pairs]),
    }
    assert measured == pytest.approx(expected, rel=1e-4)


def test_token_logratios_and_the_first_wrong_token():
    (_, model), data = tiny_data()
    rows = diagnostics.token_logratios(model, data, torch.tensor([[0, 1], [2, 3]]), 2.0)
    assert [(row["pair"], row["side"], row["first_wrong"]) for row in rows] == [
        (0, "correct", 4), (0, "incorrect", 4), (1, "correct", 5), (1, "incorrect", 5)
    ]  # fmt: skip
    assert [len(row["tokens"].split()) for row in rows] == [9, 9, 11, 11]
    with torch.no_grad():
        logits = model(data.inputs)[:, data.start :]
        logps, ref_logps, future_logps = (
            token_logps(some, data.tokens, data.mask) for some in (logits, data.ref_logits, 3 * logits - 2 * data.ref_logits)
        )
    for i, row in enumerate(rows):
        ratios = [float(text) for text in row["logratios"].split()]
        assert ratios == pytest.approx((logps - ref_logps)[i, : len(ratios)].tolist(), abs=1e-3)
        for name, values in (("ref_logps", ref_logps), ("future_logps", future_logps)):
            assert [float(text) for text in row[name].split()] == pytest.approx(values[i, : len(ratios)].tolist(), abs=1e-3)


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


def test_the_observer_writes_what_the_figures_read(tmp_path):
    (reference, model), data = tiny_data()
    model.load_state_dict(reference.state_dict())
    observe = diagnostics.Observer(model, data, SimpleNamespace(lam=2.0, seed=0), tmp_path)
    assert {tuple(pair) for pair in observe.pairs.tolist()} == {(0, 1), (2, 3)}
    for step in range(21):
        observe(step, step % 10 == 0)
        with torch.no_grad():
            model.norm.weight.add_(0.01)
    entangled = results.read_csv(tmp_path / "entanglement.csv")
    assert entangled["step"].tolist() == [0, 10, 20] and len(set(entangled["a"])) == 3
    run = results.Run(tmp_path, {}, {}, {"extrapolation": results.read_csv(tmp_path / "extrapolation.csv")})
    pairs = results.extrapolated(run)
    assert set(pairs) == {(t, later, lam) for t, later in ((10, 15), (10, 20), (15, 20)) for lam in diagnostics.LAMS}
    future, present = pairs[10, 20, 1]
    assert future < present  # the weights drift in a straight line, so the logits nearly do
    tokens = results.read_csv(tmp_path / "tokens.csv")
    # the other pair's correct side is not clean, so its first difference might not be the first wrong token
    assert observe.token_pairs.tolist() == [[0, 1]] * diagnostics.TOKEN_PAIRS
    assert tokens["step"].tolist() == [0] * 4 + [10] * 4 + [20] * 4 and tokens["side"][:2].tolist() == ["correct", "incorrect"]
