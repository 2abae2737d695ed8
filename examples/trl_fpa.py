"""FPA as a TRL trainer: DPOTrainer's data, reference model and loop, with another loss. Tried with TRL 1.16.0.

    pip install -r full_scale/requirements.txt trl==1.16.0 && python -m examples.trl_fpa

Rows are pairs of a correct and an incorrect answer, as DPO's. Log-probabilities are computed in chunks, so that no logits of
all positions are held. docs/trl.md has a patch that adds the loss to TRL's KTOTrainer, whose rows need no pairs. Left out:
DPOTrainer's metrics and predictions, PEFT, models that are wrapped for several GPUs, and models whose logits have a bias, a
scale or a cap.
"""

import torch
from trl import DPOTrainer

from full_scale.chunked import chunked_logps
from losses import fpa


class FPATrainer(DPOTrainer):
    """DPOTrainer with FPA's loss. It needs a ref_model, because it extrapolates logits; log-probabilities are not enough."""

    lam, target = 2.0, "both"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """FPA's mean over rows, a scalar to minimise (arXiv 2509.19893), of TRL's batch of pairs."""
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()  # (B, T), (B, T - 1); correct rows first

        def states(policy):  # of the positions that predict a completion token (N, D)
            with self.accelerator.autocast():  # which accelerate puts around the whole model's forward only
                return policy.base_model(ids, attention_mask=inputs["attention_mask"]).last_hidden_state[:, :-1][mask]

        with torch.no_grad():
            ref_states = states(self.ref_model)
        head, ref_head = (plain_head(policy) for policy in (model, self.ref_model))
        logps, future_logps = chunked_logps(states(model), head, ids[:, 1:][mask], ref_states, ref_head, self.lam)  # (N,)
        rows = mask.nonzero()[:, 0]
        logp_sum, future_logp_sum = (logps.new_zeros(len(ids)).index_add(0, rows, some) for some in (logps, future_logps))
        reward = torch.ones(len(ids), device=ids.device)
        reward[len(ids) // 2 :] = -1
        losses, _ = fpa(logp_sum, future_logp_sum, mask.sum(-1), reward, self.target)
        return (losses.mean(), {}) if return_outputs else losses.mean()


def plain_head(policy):
    """The weights (V, D) of a model's head. Raises ValueError where logits are more than hidden states times these weights."""
    head, settings = policy.get_output_embeddings(), ("logit_scale", "logits_scaling", "final_logit_softcapping")
    more = [name for name in settings if getattr(policy.config, name, None) not in (None, 1)]
    more += ["a bias"] if head.bias is not None else []
    if more:
        raise ValueError(f"this model's logits have {', '.join(more)}, which is left out here; docs/trl.patch has it")
    return head.weight


def main(folder="runs/trl_fpa", steps=5, trainer=FPATrainer):
    """Train a tiny random model on two pairs. Returns the trainer. TRL writes into `folder`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig

    letters = {letter: i for i, letter in enumerate("0123456789+=, .QA:\n")}
    words = Tokenizer(models.WordLevel(letters | {"<eos>": len(letters)}, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    pairs = [
        {"prompt": "3+2+5=", "chosen": "5+5=10", "rejected": "5+5=11"},
        {"prompt": "4+1+1=", "chosen": "5+1=6", "rejected": "5+1=7"},
    ]
    settings = DPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, gradient_checkpointing=False, bf16=False,
        use_cpu=True, save_strategy="no", logging_steps=1, report_to="none",
    )  # fmt: skip
    made = trainer(model, reference, settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    made.train()
    return made


if __name__ == "__main__":
    main()
