"""docs/trl.patch on a copy of TRL: a step of the patched KTOTrainer against losses.py, its refusals, and docs/trl.md's snippet.

Run as a program, with the copy in front of the installed TRL, it prints what the tests below look at.
"""

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE, PATCH = Path("docs/trl.md"), Path("docs/trl.patch")
VERSION = "1.16.0"
ROWS = [  # of different lengths; the first batch of four has correct rows only
    ("3+2=", "5", True),
    ("3+2+5=", "5+5=10", True),
    ("4+1+1=", "5+1=6", True),
    ("9+9=", "18", True),
    ("3+2+5=", "5+5=11", False),
    ("4+1=", "6", False),
    ("4+1+1=", "5+1=7, 7", False),
    ("1=", "10", False),
]
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 18, "pad_token_id": 17, "bos_token_id": 17, "eos_token_id": 17, "initializer_range": 0.1,
}  # fmt: skip
ARCHITECTURES = {  # plain, then what a head can have: a scale, a cap of the logits, a bias
    "Llama": {},
    "Granite": {"logits_scaling": 0.5},
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16},
    "Phi": {},
}


def page_block(language):
    """The one block of the page in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    return found


def apply_patch(environment):
    """The page's command, or git's where there is no `patch`."""
    command = page_block("").strip()
    assert command.startswith("patch -p1 -d ") and command.endswith(f" < {PATCH}")
    if not shutil.which("patch"):
        command = re.sub(r"^patch -p1 -d (.*) < (.*)$", r'p=$PWD/\2 && cd \1 && git apply -p1 "$p"', command)
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `main` prints, run with a patched copy of TRL."""
    pytest.importorskip("trl")
    if importlib.metadata.version("trl") != VERSION:
        pytest.skip(f"the patch is for TRL {VERSION}")
    folder = tmp_path_factory.mktemp("trl")
    installed = importlib.metadata.distribution("trl").locate_file("trl")
    shutil.copytree(installed, folder / "copy/trl", ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join([str(folder / "copy"), str(Path.cwd())])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    outside = {"PYTHONPATH": path, "PATH": programs, "HF_HUB_OFFLINE": "1", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = apply_patch(os.environ | outside)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=os.environ | outside, cwd=Path.cwd(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["trl"]).parent == folder / "copy/trl"
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lam", ["0.0", "2.0"])
def test_a_step_is_that_of_losses_py(measured, architecture, lam):
    """At lam = 0 against off_rl_loss, at lam = 2 against fpa_loss: the logged loss, and how far SGD moved the weights."""
    step = measured["steps"][architecture][lam]
    assert step["loss"] == pytest.approx(step["expected_loss"], abs=1e-6)
    assert step["error"] < 1e-3 * step["norm"] and step["norm"] > 5e-3
    assert step["other"] > 0.05 * step["norm"]  # the other lam's gradient is another one


def test_logits_are_float32_and_held_for_one_answer_at_a_time(measured):
    lengths = [len(completion) + 1 for _, completion, _ in ROWS]  # EOS is trained too
    assert measured["type"] == "torch.float32"
    assert measured["positions"] == [length for length in lengths for _ in range(2)]  # under the policy and the reference


REFUSED = "precompute_ref_log_probs sync_ref_model fpa_lambda PEFT FSDP DeepSpeed parallelism_config".split()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(measured, name):
    kind, text = measured["refused"][name]
    assert kind == "ValueError" and text.startswith("`loss_type='fpa'` needs") and name in text
    assert name in PAGE.read_text().split("## What it leaves out")[1]


def test_the_other_losses_refuse_nothing_new(measured):
    assert measured["refused"]["kto"] is None


def test_the_pages_snippet_trains(measured):
    assert measured["snippet"]["step"] == 2 and all(abs(loss) > 0 for loss in measured["snippet"]["losses"])


def test_the_page_counts_the_patch():
    lines = [line for line in PATCH.read_text().splitlines() if not line.startswith(("+++", "---"))]
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    assert f"It adds {added} lines and removes {removed}." in PAGE.read_text() and added <= 40
    files = re.findall(r"^\+\+\+ b/(\S+)$", PATCH.read_text(), flags=re.M)
    assert sorted(re.findall(r"`(trl/trainer/\w+\.py)`", PAGE.read_text())) == sorted(files)
    assert len(PAGE.read_text().splitlines()) <= 60


# --- the program


def tokenizer_of_letters():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("0123456789+=, .QA")}
    words = Tokenizer(models.WordLevel(letters | {"<eos>": len(letters)}, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def random_model(architecture, seed):
    """Two seeds give two models that disagree, so that the future policy is neither of them."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**SIZES | ARCHITECTURES[architecture])
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, std=0.3)
    return model


def trainer_of(folder, architecture="Llama", kind=None, **settings):
    """A KTOTrainer of a model and another one as its reference: one step of plain SGD on all rows, in two batches."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    settings = {
        "loss_type": "fpa", "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False,
        "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    } | settings  # fmt: skip
    return (kind or KTOTrainer)(
        random_model(architecture, 0),
        random_model(architecture, 1),
        KTOConfig(str(folder / "run"), **settings),
        train_dataset=Dataset.from_list([dict(zip(("prompt", "completion", "label"), row)) for row in ROWS]),
        processing_class=tokenizer_of_letters(),
    )


def batch():
    """tokens (B, T), real (B, T), mask (B, T) and reward (B,), made without TRL."""
    tokenizer, eos = tokenizer_of_letters(), SIZES["eos_token_id"]
    rows = [(tokenizer.encode(prompt), [*tokenizer.encode(completion), eos]) for prompt, completion, _ in ROWS]
    width = max(len(prompt + completion) for prompt, completion in rows)
    tokens, real, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, completion) in enumerate(rows):
        tokens[i, : len(prompt + completion)] = torch.tensor(prompt + completion)
        real[i, : len(prompt + completion)] = 1
        mask[i, len(prompt) : len(prompt + completion)] = 1
    return tokens, real, mask.bool(), torch.tensor([1.0 if label else -1.0 for *_, label in ROWS])


def expected(architecture, lam):
    """The loss of losses.py on all rows, and its gradient."""
    from losses import fpa_loss, off_rl_loss

    model, reference = (random_model(architecture, seed).train() for seed in (0, 1))
    for module in (*model.modules(), *reference.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens, real, mask, reward = batch()
    logits = model(tokens, attention_mask=real).logits
    with torch.no_grad():
        ref_logits = reference(tokens, attention_mask=real).logits
    loss = fpa_loss(logits, ref_logits, tokens, mask, reward, lam) if lam else off_rl_loss(logits, tokens, mask, reward)
    loss.backward()
    return loss.item(), flat(parameter.grad for parameter in model.parameters())


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def measure_step(folder, architecture, lam):
    trainer = trainer_of(folder, architecture, fpa_lambda=lam)
    before = flat(trainer.model.parameters())
    trainer.train()
    moved = before - flat(trainer.model.parameters())  # a learning rate of 1: the gradient
    loss, gradient = expected(architecture, lam)
    other = expected(architecture, 2.0 - lam)[1]
    logged = trainer.state.log_history[0]["loss"]
    norms = {"error": moved - gradient, "norm": gradient, "other": other - gradient}
    return {"loss": logged, "expected_loss": loss} | {name: x.norm().item() for name, x in norms.items()}


def measure_logits(folder):
    """How many positions' logits each call makes, and of which type they are where the model is in bfloat16."""
    trainer, positions = trainer_of(folder, train_sampling_strategy="sequential"), []
    for model in (trainer.model, trainer.ref_model):

        def spied(hidden, original=model.float_logits):
            logits = original(hidden)
            positions.append(len(logits))
            return logits

        model.float_logits = spied
    trainer.train()
    made, hidden = list(positions), torch.zeros(1, SIZES["hidden_size"], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        return {"positions": made, "type": str(trainer.model.bfloat16().float_logits(hidden).dtype)}


def refusal(folder, kind=None, **settings):
    try:
        trainer_of(folder, kind=kind, **settings)
    except Exception as error:
        return type(error).__name__, str(error)


def measure_refusals(folder):
    from trl import KTOTrainer
    from trl.trainer import kto_trainer

    def pretending(set_up):
        """A KTOTrainer whose accelerator has what one CPU cannot have."""

        class Pretending(KTOTrainer):
            def create_accelerator_and_postprocess(self):
                super().create_accelerator_and_postprocess()
                set_up(self)

        return Pretending

    found = {name: refusal(folder, **{name: True}) for name in ("precompute_ref_log_probs", "sync_ref_model")}
    found["fpa_lambda"] = refusal(folder, fpa_lambda=-0.5)
    found["kto"] = refusal(folder, loss_type="kto", sync_ref_model=True, fpa_lambda=-0.5)
    for name, attribute in (("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")):
        found[name] = refusal(folder, pretending(lambda trainer, attribute=attribute: setattr(trainer, attribute, True)))
    parallel = pretending(lambda trainer: setattr(trainer, "accelerator", Parallel(trainer.accelerator)))
    found["parallelism_config"] = refusal(folder, parallel)
    kto_trainer.is_peft_model, kto_trainer.BaseTunerLayer = lambda model: True, ()  # PEFT may be absent
    found["PEFT"] = refusal(folder)
    return found


class Parallel:
    """An accelerator with a parallelism_config."""

    def __init__(self, accelerator):
        from accelerate.parallelism_config import ParallelismConfig

        self.accelerator, self.parallelism_config = accelerator, ParallelismConfig()

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


def measure_snippet(folder):
    """The page's snippet as it stands, but for a tiny model, two steps, and a CPU."""
    import trl
    from datasets import Dataset

    random_model("Llama", 0).save_pretrained(folder / "model")
    tokenizer_of_letters().save_pretrained(folder / "model")
    code = page_block("python").replace('"Qwen/Qwen2.5-0.5B"', repr(str(folder / "model")))
    code = code.replace('"runs/trl"', repr(str(folder / "run")))
    assert code.count(str(folder)) == 2
    trl.KTOConfig = functools.partial(
        trl.KTOConfig, max_steps=2, use_cpu=True, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True
    )
    names = {"rows": Dataset.from_list([dict(zip(("prompt", "completion", "label"), row)) for row in ROWS])}
    exec(code, names)
    state = names["trainer"].state
    return {"step": state.global_step, "losses": [row["loss"] for row in state.log_history if "loss" in row]}


def main(folder):
    import trl

    steps = {name: {str(lam): measure_step(folder, name, lam) for lam in (0.0, 2.0)} for name in ARCHITECTURES}
    found = {"trl": trl.__file__, "steps": steps} | measure_logits(folder)
    found |= {"snippet": measure_snippet(folder), "refused": measure_refusals(folder)}  # this order: refusals pretend
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
