"""examples/: each runs by its command, and at lam = 0 each has the plain gradient of Off-RL."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from losses import off_rl_loss


def test_the_own_loop_runs_and_moves_the_rows_apart():
    done = subprocess.run([sys.executable, "-m", "examples.own_loop"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_, last = (line.split() for line in done.stdout.splitlines())
    assert first == "step 0 log-ratio correct +0.00 incorrect +0.00".split() and last[:2] == ["step", "19"]
    assert float(last[4]) > float(last[6]) + 1


def test_the_own_loop_at_lam_0_is_off_rl():
    from examples import own_loop

    torch.manual_seed(0)
    plain, encode, eos = own_loop.tiny()
    at_0, at_2 = (copy.deepcopy(plain) for _ in range(2))
    tokens, real, mask, reward = own_loop.batch(encode, eos)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(3):  # at the first step any lam is Off-RL
        optimizer.zero_grad()
        off_rl_loss(plain(tokens, attention_mask=real).logits, tokens, mask, reward).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for model, lam in ((at_0, 0.0), (at_2, 2.0)):
        own_loop.train(model, encode, eos, steps=3, lam=lam)
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs) == (lam == 0)
    assert not mask[~real].any() and mask.sum(-1).tolist() == [len(encode(answer)) + 1 for answer, _ in own_loop.ANSWERS]


def gradient_of(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_trl_trainer_runs_and_its_loss_is_losses_pys(tmp_path):
    pytest.importorskip("trl")
    from examples import trl_fpa
    from losses import fpa_loss

    trainer = trl_fpa.main(str(tmp_path), steps=3)
    assert trainer.state.global_step == 3 and all("loss" in row for row in trainer.state.log_history[:3])
    model, reference = trainer.model, trainer.ref_model
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, real, mask = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"].bool()
    reward = torch.tensor([1.0] * (len(ids) // 2) + [-1.0] * (len(ids) // 2))

    def logits_of(policy):
        return policy.lm_head(policy.model(ids, attention_mask=real).last_hidden_state)

    for lam, loss in ((2.0, fpa_loss), (0.0, off_rl_loss)):
        trainer.lam = lam
        ref_logits = [logits_of(reference).detach()] if lam else []
        expected = gradient_of(loss(logits_of(model), *ref_logits, ids, mask, reward), model)
        got = gradient_of(trainer.compute_loss(model, inputs), model)
        assert torch.allclose(got, expected, atol=1e-6) and got.abs().max() > 1e-4


@pytest.mark.parametrize("more", ["a bias", "logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_the_trl_trainer_refuses_a_head_that_it_would_get_wrong(more):
    pytest.importorskip("trl")
    from examples.trl_fpa import plain_head

    def policy(bias=False, **settings):
        head = torch.nn.Linear(4, 7, bias=bias)
        return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(**settings))

    plain = policy(logits_scaling=1.0)
    assert plain_head(plain) is plain.get_output_embeddings().weight
    with pytest.raises(ValueError, match=f"logits have {more}, which"):
        plain_head(policy(bias=True) if more == "a bias" else policy(**{more: 0.5}))
