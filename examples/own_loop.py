"""FPA in a loop of your own: plain torch and a transformers model.

    pip install -r full_scale/requirements.txt && python -m examples.own_loop
    python -m examples.own_loop Qwen/Qwen2.5-0.5B   # a checkpoint instead of a tiny random model

Copy `fpa_loss`, `future_logits`, `token_logps` and `checked_length` from losses.py. Your part is `batch` and two forwards. Left
out: evaluation, checkpoints, more than one batch, and a BOS before the prompt, which some models want.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from losses import fpa_loss, token_logps

PROMPT = "Q: 3 + 2 + 5\nA:"
ANSWERS = [
    (" 3 + 2 = 5, 5 + 5 = 10.", 1.0),
    (" 3 + 2 = 5, 5 + 5 = 11.", -1.0),
    (" 3 + 2 = 6, 6 + 5 = 11.", -1.0),
    (" 10.", 1.0),
]


def tiny():
    """A random model, an encoder of bytes, and the token that ends an answer; they need no download."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)), lambda text: list(text.encode()), 256


def batch(encode, eos):
    """tokens (B, T), which of them are real, which are completion (B, T), and rewards (B,).

    An answer ends with eos, which is trained too. Rows end at their own lengths. The padding behind them is no completion. The
    mask is False there, so that padding has no gradient and does not count in |y|.
    """
    rows = [(encode(PROMPT), encode(answer) + [eos]) for answer, _ in ANSWERS]
    width = max(len(prompt + answer) for prompt, answer in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt + answer)] = torch.tensor(prompt + answer)
        mask[i, len(prompt) : len(prompt + answer)] = True
    real = torch.arange(width) < torch.tensor([len(prompt + answer) for prompt, answer in rows])[:, None]
    return tokens, real, mask, torch.tensor([reward for _, reward in ANSWERS])


def train(model, encode, eos, steps=20, lam=2.0, lr=1e-3):
    """Train in place."""
    reference = copy.deepcopy(model).eval()  # what sampled the answers; training starts here
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    tokens, real, mask, reward = batch(encode, eos)
    with torch.no_grad():  # (B, T, V) floats: 16 rows of 512 tokens take 5 GB at V = 152,000; full_scale/chunked.py avoids them
        ref_logits = reference(tokens, attention_mask=real).logits.float()
    for step in range(steps):
        logits = model(tokens, attention_mask=real).logits.float()  # in float32, since lam magnifies rounding
        loss = fpa_loss(logits, ref_logits, tokens, mask, reward, lam)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logratio = (token_logps(logits, tokens, mask) - token_logps(ref_logits, tokens, mask)).sum(-1)  # watch it, not the loss
        correct, incorrect = logratio[reward > 0].mean(), logratio[reward < 0].mean()
        print(f"step {step:3}   log-ratio correct {correct:+.2f}   incorrect {incorrect:+.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:]:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        # fp32, because a step of 1e-6 is lost in bf16 weights; no pickled weights, which can run code
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, use_safetensors=True)
        train(model, encode, tokenizer.eos_token_id, lr=1e-6)
    else:
        train(*tiny())
