"""full_scale/chunked.py alone, and the import rule of full_scale/."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from full_scale.chunked import CHUNK, HeadLogps, chunked_logps, extrapolated
from losses import future_logits, token_logps


@pytest.mark.parametrize("positions", [1, CHUNK, 2 * CHUNK + 3])
def test_chunked_log_probabilities_and_their_gradient_are_the_plain_ones(positions):
    torch.manual_seed(0)
    hidden, head, ref_hidden, ref_head = (torch.randn(n, 16) for n in (positions, 50, positions, 50))
    targets, upstream = torch.randint(50, (positions,)), torch.randn(positions)
    hidden.requires_grad_(), head.requires_grad_()

    present, future = chunked_logps(hidden, head, targets, ref_hidden, ref_head, 2.0)
    gradients = torch.autograd.grad(present @ upstream, (hidden, head))

    logits, ref_logits = hidden @ head.T, ref_hidden @ ref_head.T
    tokens, mask = torch.cat([targets[:1], targets])[None], torch.arange(positions + 1)[None] > 0
    pad = torch.nn.functional.pad
    expected = token_logps(pad(logits, (0, 0, 0, 1))[None], tokens, mask)[0]
    expected_future = token_logps(pad(future_logits(logits, ref_logits, 2.0), (0, 0, 0, 1))[None], tokens, mask)[0]
    torch.testing.assert_close(present, expected)
    torch.testing.assert_close(future, expected_future)
    assert not future.requires_grad
    for ours, plain in zip(gradients, torch.autograd.grad(expected @ upstream, (hidden, head))):
        torch.testing.assert_close(ours, plain)


def test_log_probabilities_are_finite_at_the_extremes():
    hidden, head = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    present, future = HeadLogps.apply(hidden, head, torch.tensor([1, 1]), torch.zeros(2, 1), torch.zeros(3, 1), 10.0)
    present.sum().backward()
    for values in (present, future, hidden.grad, head.grad):
        assert values.isfinite().all()
    assert present[0] == -2e4


def test_without_a_reference_the_future_is_the_present():
    hidden, head, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    present, future = chunked_logps(hidden, head, targets)
    assert torch.equal(present, future) and not future.requires_grad
    at_zero = chunked_logps(hidden, head, targets, torch.randn(3, 6), torch.randn(5, 6), 0.0)[1]  # a reference of another width
    torch.testing.assert_close(at_zero, present)


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_the_extrapolation_is_that_of_losses(lam):
    logits, ref_logits = torch.randn(2, 7, 11)
    assert torch.equal(extrapolated(logits, ref_logits, lam), future_logits(logits, ref_logits, lam))


def test_autocast_does_not_round_the_logits():
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden, head = (torch.randn(n, 64, generator=g) for n in (5, 5, 1000))
    targets = torch.arange(5)
    plain = chunked_logps(hidden, head, targets, ref_hidden, head, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = chunked_logps(hidden, head, targets, ref_hidden, head, 2.0)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, rounded))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_hidden_states_and_head_may_be_of_two_types(types):
    hidden, head = (torch.randn(n, 8).to(dtype).requires_grad_() for n, dtype in zip((3, 11), types))
    chunked_logps(hidden, head, torch.arange(3))[0].sum().backward()
    assert (hidden.grad.dtype, head.grad.dtype) == types
    plain = [x.detach().float().requires_grad_() for x in (hidden, head)]
    (plain[0] @ plain[1].T).log_softmax(-1)[torch.arange(3), torch.arange(3)].sum().backward()
    for ours, theirs in zip((hidden, head), plain):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=0.05, atol=0.05)


def test_shapes_that_disagree_are_refused():
    hidden, head, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    with pytest.raises(ValueError, match=r"head \(V, D\).* not hidden \[3, 4\], head \[4, 5\]"):
        chunked_logps(hidden, head.T, targets)
    with pytest.raises(ValueError, match=r"targets \[1, 3\]"):
        chunked_logps(hidden, head, targets[None])
    with pytest.raises(ValueError, match="the future policy needs ref_hidden and ref_head"):
        chunked_logps(hidden, head, targets, lam=2.0)
    with pytest.raises(ValueError, match="the future policy needs ref_hidden and ref_head"):
        chunked_logps(hidden, head, targets, hidden, None, 2.0)
    with pytest.raises(ValueError, match=r"ref_hidden \[2, 4\], ref_head \[5, 4\]"):
        chunked_logps(hidden, head, targets, hidden[:2], head, 2.0)


def test_the_file_works_alone_and_its_docstrings_example_holds(tmp_path):
    (tmp_path / "chunked.py").write_text((ROOT / "full_scale" / "chunked.py").read_text())
    code = "import chunked, doctest, sys; done = doctest.testmod(chunked); sys.exit(done.failed or done.attempted < 8)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_full_scale_imports_neither_train_nor_matplotlib():
    names = sorted(path.stem for path in (ROOT / "full_scale").glob("*.py") if path.stem != "__init__")
    imports = "; ".join(f"import full_scale.{name}" for name in names)
    forbidden = "{name for name in sys.modules if name.split('.')[0] in ('train', 'plots', 'study', 'matplotlib')}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; print({forbidden})"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
