"""full_scale/'s prompts and tokens: templates as transformers renders them, and training on the tokens that were sampled."""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_docs import table
from test_full_scale import ROLLOUTS, TEMPLATE, assistant, change_json, make_checkpoint, user, write
from test_full_scale_training import QUICK, run_module

import full_scale.rollouts
from full_scale.data import first_date, read_data
from full_scale.load_hf import ChatTokenizer
from full_scale.prompts import PROMPT
from full_scale.rollouts import answer_of, text_ends
from full_scale.rows import read_rollouts, tokens_of
from model import GPT
from plumbing.files import UserError

EXAMPLES = settings(max_examples=300, deadline=None)
EXTRA = ["<|endoftext|>", "<|eot_id|>", "</s>", "<s>"]  # special tokens beside <|bos|>, <|im_end|>, <|im_start|>
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
EACH = "{% for m in messages %}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def checkpoint_of(folder, template=None, eos=None, **options):
    """A checkpoint with the tokens of EXTRA; its template, and the token that ends its answers, in every file that says so."""
    make_checkpoint(folder, vocab_size=320, **options)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(EXTRA)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if eos:
        change_json(folder / "tokenizer_config.json", eos_token=eos)
        for name in ("config.json", "generation_config.json"):
            change_json(folder / name, eos_token_id=tokenizer.token_to_id(eos))
    return folder


def test_a_completion_of_no_token_is_refused():
    """A tokenizer may leave a text out, here spaces."""
    tokenizer = SimpleNamespace(encode_after=lambda prompt, ids, text: [7] * len(text.strip()), stops={1}, eos=1)
    row = {"prompt": "a", "completion": " ", "finished": False, "chat": False}
    with pytest.raises(ValueError, match="^a completion of no token$"):
        tokens_of(row, tokenizer, lambda text, special: [5])
    assert tokens_of({**row, "finished": True}, tokenizer, lambda text, special: [5]) == ([5], [1])


def test_an_end_token_beyond_the_weights_is_refused(tmp_path):
    folder = checkpoint_of(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))
    change_json(folder / "tokenizer_config.json", eos_token="<|99|>")
    place = tokenizer.token_to_id("<|99|>")
    with pytest.raises(UserError, match=f"the tokenizer's eos_token is token {place}, and the vocabulary is of 320"):
        ChatTokenizer(folder)


def test_a_template_may_read_words_of_any_name(tmp_path):
    template = f"{EACH}{CHATML}{{% endfor %}}{{{{ text }}}}{{{{ answer }}}}"
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path, template))
    asked = [{"role": "user", "content": "a"}]
    assert tokenizer.render(asked, text="x", answer="y") == f"{tokenizer.render(asked)}xy"


@pytest.fixture
def with_template(tmp_path):
    """A function from a template, or none, to the ChatTokenizer of a checkpoint that has it."""
    number = iter(range(100))
    return lambda template=None, **words: ChatTokenizer(checkpoint_of(tmp_path / str(next(number)), template, **words))


def trained(folder, lines, **words):
    """[(prompt, completion)] as training has them, special tokens shown."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        tokenizer = ChatTokenizer(folder)
        path = write(folder / "rows.jsonl", *lines)
        data = read_data(argparse.Namespace(data=path, max_length=500, skip_bad_lines=False, **words), tokenizer)
    finally:
        torch.distributed.destroy_process_group()
    return [
        tuple(tokenizer.decode(ids, special=True) for ids in (tokens[:length].tolist(), tokens[length:].tolist()))
        for tokens, length in zip(data.tokens, data.prompt_length)
    ]


# --- templates

TEMPLATES = {
    "the tests'": TEMPLATE,
    "ChatML": EACH + CHATML + "{% endfor %}" + ASSISTANT,
    "generation tags": EACH + "<|im_start|>{{m.role}}\n{% generation %}{{m.content}}{% endgeneration %}<|im_end|>\n"
        "{% endfor %}",
    "JSON": "{{ messages|tojson }}",
    "JSON in ASCII": "{{ messages|tojson(ensure_ascii=True) }}",
    "JSON, separators": "{{ messages|tojson(separators=(',', ':')) }}",
    "JSON, sorted and indented": "{{ messages|tojson(sort_keys=true, indent=2) }}",
    "BOS, trimmed": "{{ bos_token }}" + EACH + "{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "loop controls": EACH + "{% if loop.index > 3 %}{% break %}{% endif %}" + CHATML + "{% endfor %}",
    "namespace and dict": "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{{ dict(a=ns.n)|tojson }}" + CHATML
        + "{% endfor %}",
    "macro": "{% macro turn(m) %}" + CHATML + "{% endmacro %}" + EACH + "{{ turn(m) }}{% endfor %}" + ASSISTANT,
    "Llama 3": "{{ bos_token }}" + EACH + "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    "Llama 2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ '<s>' + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + '</s>' }}{% endif %}"
        "{% endfor %}",
}  # fmt: skip
SAID = st.text(min_size=1, max_size=20).filter(str.strip)
TURNS = st.builds(
    lambda system, texts: system + [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)],
    st.lists(st.builds(lambda text: {"role": "system", "content": text}, SAID), max_size=1),
    st.lists(SAID, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2),
)


@pytest.fixture(scope="module")
def every_template(tmp_path_factory):
    """{name: (ours, transformers' own)}."""
    folder = checkpoint_of(tmp_path_factory.mktemp("templates"))
    found = {}
    for name, template in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(template)
        found[name] = ChatTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return found


@given(messages=TURNS)
@EXAMPLES
def test_prompts_are_those_of_transformers(messages, every_template):
    for name, (ours, theirs) in every_template.items():
        if name == "loop controls" and len(messages) > 3:  # which leaves out what comes after
            with pytest.raises(UserError, match="the chat template leaves out content"):
                ours.render(messages)
            continue
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == text, name
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ours.encode(text, special=False) == ids, name


SYSTEM = {
    "refused": EACH + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
        + "{% endfor %}",
    "left out": EACH + "{% if m.role != 'system' %}" + CHATML + "{% endif %}{% endfor %}",
    "left out as no branch has it": EACH + "{% if m.role == 'user' %}" + CHATML + "{% elif m.role == 'assistant' %}" + CHATML
        + "{% endif %}{% endfor %}",
    "turns that alternate": EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation "
        "roles must alternate user/assistant/user/assistant/...') }}{% endif %}" + CHATML + "{% endfor %}",
    "fails": EACH + "{% if m.role == 'system' %}{{ 1 / 0 }}{% endif %}" + CHATML + "{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("template", SYSTEM.values(), ids=SYSTEM)
def test_an_instruction_without_a_system_role_goes_to_the_user(template, with_template):
    """The case `template-and-system`."""
    tokenizer = with_template(template)
    assert tokenizer.ask("What is 1+1?") == f"<|im_start|>user\nWhat is 1+1?\n{PROMPT}<|im_end|>\n"
    assert tokenizer.ask("What is 1+1?", system="") == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
    with pytest.raises(UserError, match="the chat template"):
        tokenizer.render([{"role": "system", "content": "Help."}, user("1+1?")])


def test_the_instruction_is_the_systems_where_there_is_a_role(with_template):
    tokenizer = with_template(TEMPLATES["ChatML"])
    asked = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.ask("1?") == f"<|im_start|>system\n{PROMPT}<|im_end|>\n{asked}"
    assert tokenizer.ask("1?", "Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    assert tokenizer.ask("1?", "") == asked
    llama2 = with_template(TEMPLATES["Llama 2"])
    assert llama2.ask("1?", "Be brief.") == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n1? [/INST]"
    with pytest.raises(UserError, match="the chat template leaves out content"):
        with_template("Hello.").ask("1?")
    own = "{% if messages[0].role != 'system' or not messages[0].content %}" + CHATML.replace("{{ m.role }}", "system")
    own = own.replace("{{ m.content }}", PROMPT) + "{% endif %}"  # as Qwen2.5-Math, whose own instruction is ours
    own += EACH + "{% if m.content %}" + CHATML + "{% endif %}{% endfor %}"
    assert with_template(own).ask("1?").count(PROMPT) == 1


def several(folder, **templates):
    named = [{"name": name, "template": template} for name, template in templates.items()]
    change_json(folder / "tokenizer_config.json", chat_template=named)
    return ChatTokenizer(folder)


def test_several_templates_without_a_default_are_named(tmp_path):
    tokenizer = several(checkpoint_of(tmp_path), tool_use="x", rag="R:" + TEMPLATES["ChatML"])
    with pytest.raises(
        UserError, match="the chat template is one of rag, tool_use: choose by --template-arg chat_template=NAME, "
    ):
        tokenizer.ask("1?")
    tokenizer.use_template({"chat_template": "rag"}, datetime.datetime.now())
    assert tokenizer.ask("1?", "") == "R:<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.use_template({"chat_template": "other"}, datetime.datetime.now())
    with pytest.raises(UserError, match="the chat template is one of rag, tool_use"):
        tokenizer.ask("1?")
    assert several(tmp_path, tool_use="x", default=TEMPLATES["ChatML"]).ask("1?", "").startswith("<|im_start|>user\n1?")


def test_words_go_to_the_template(with_template):
    thinks = TEMPLATES["ChatML"] + "{% if add_generation_prompt and enable_thinking is false %}(no){% endif %}"
    tokenizer = with_template(thinks)
    assert not tokenizer.ask("1?").endswith("(no)")
    tokenizer.use_template({"enable_thinking": False}, datetime.datetime.now())
    assert tokenizer.ask("1?").endswith("(no)")


def test_a_date_is_the_one_that_is_given(with_template):
    tokenizer = with_template("Today is {{ strftime_now('%d %b %Y, %H:%M') }}." + TEMPLATES["ChatML"])
    assert tokenizer.ask("1?").startswith(f"Today is {datetime.datetime.now():%d %b %Y, }")
    tokenizer.use_template({}, datetime.datetime(2024, 7, 26, 12, 30))
    assert tokenizer.ask("1?").startswith("Today is 26 Jul 2024, 12:30.<|im_start|>system")


SHOTS = [("1+1?", "It is 2.\n#### 2"), ("2+2?", "It is 4.\n#### 4")]


def test_shots_are_turns_or_plain_text(with_template):
    assert (
        with_template(TEMPLATES["ChatML"]).ask("3+3?", "", SHOTS)
        == "".join(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n" for asked, said in SHOTS)
        + "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = (
        "Problem:\n1+1?\n\nSolution: It is 2.\n#### 2\n\nProblem:\n2+2?\n\nSolution: It is 4.\n#### 4\n\n"
        "Problem:\n3+3?\n\nSolution:"
    )
    tokenizer = with_template(TEMPLATES["ChatML"])
    tokenizer.use_template({}, datetime.datetime.now(), plain=True)
    assert tokenizer.ask("3+3?", "", SHOTS) == plain
    assert tokenizer.ask("3+3?", "Solve.", SHOTS) == f"Solve.\n\n{plain}"
    assert tokenizer.ask("3+3?", "Solve.") == "3+3?\nSolve.\n"
    assert tokenizer.ask("3+3?", "") == "3+3?\n"


# --- the end of a turn


def test_a_text_that_has_its_end_gets_no_second_one(tmp_path):
    """The case `double-eos`."""
    checkpoint_of(tmp_path)
    row = {"prompt": "Hi?", "chosen": "yes<|im_end|>\n", "rejected": "no<|im_end|>\n"}
    assert trained(tmp_path, [row]) == [("Hi?", "yes<|im_end|>"), ("Hi?", "no<|im_end|>")]


ENDS = {  # an answer: what is trained where the template ends by <|im_end|> and the tokenizer by <|endoftext|>
    "yes": "yes<|im_end|>",
    "yes<|im_end|>": "yes<|im_end|>",
    "yes<|im_end|>\n\n ": "yes<|im_end|>",
    "yes<|im_end|><|endoftext|>": "yes<|im_end|>",
    "yes<|im_end|>\n<|endoftext|>\n": "yes<|im_end|>",
    "yes<|endoftext|>": "yes<|endoftext|>",
    "yes<|im_end|><|im_end|>": "yes<|im_end|>",
    "yes \n": "yes \n<|im_end|>",
    "y<|im_start|>es": "y<|im_start|>es<|im_end|>",
    "y</s>es": "y</s>es<|im_end|>",
    "<|im_end|>": "<|im_end|>",
}


def test_an_answer_has_one_end(tmp_path):
    checkpoint_of(tmp_path, eos="<|endoftext|>")
    rows = [{"prompt": "Hi?", "chosen": text, "rejected": "no"} for text in ENDS]
    assert [completion for _, completion in trained(tmp_path, rows)[::2]] == list(ENDS.values())
    rows = [{"prompt": [user("Hi?")], "chosen": [assistant(text)], "rejected": "no"} for text in ENDS]
    expected = [text.replace(" \n", "") for text in ENDS.values()]  # which the template trims
    assert [completion for _, completion in trained(tmp_path, rows)[::2]] == expected
    rows = [
        {"prompt": "Hi?", "completion": text, "label": label, "finished": False} for text in ("yes", "no") for label in (0, 1)
    ]
    assert {completion for _, completion in trained(tmp_path, rows)} == {"yes", "no"}


@pytest.mark.parametrize("text", ["yes<|im_end|>\n<|im_start|>user\n", "yes<|im_end|>no", "<|endoftext|>yes<|im_end|>"])
def test_an_answer_that_goes_on_after_its_end_is_refused(text, tmp_path):
    checkpoint_of(tmp_path, eos="<|endoftext|>")
    with pytest.raises(UserError, match=r"1 of 1 lines are bad: line 1: the completion goes on after its end <\|"):
        trained(tmp_path, [{"prompt": "Hi?", "chosen": text, "rejected": "no"}])


def test_the_end_is_that_of_the_template(tmp_path):
    """The case `eos-of-the-turn`: Llama-3-8B-Instruct as it was published first."""
    template = (
        "{{bos_token}}{% for m in messages %}<|im_start|>{{m.role}}\n\n{{m.content}}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    )
    checkpoint_of(tmp_path, template, "<|endoftext|>", architecture="Llama")
    prompt = "<|bos|><|im_start|>user\n\nHi?<|eot_id|><|im_start|>assistant\n\n"
    row = {"prompt": [user("Hi?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert trained(tmp_path, [row]) == [(prompt, "yes<|eot_id|>"), (prompt, "no<|eot_id|>")]
    assert trained(tmp_path, [{**row, "chosen": "yes", "rejected": "no"}]) == [
        (prompt, "yes<|eot_id|>"),
        (prompt, "no<|eot_id|>"),
    ]


TURN_ENDS = {  # a template: the token that ends its turns, where <|endoftext|> is the tokenizer's own
    TEMPLATE: "<|im_end|>",
    TEMPLATES["generation tags"]: "<|im_end|>",
    TEMPLATES["Llama 3"]: "<|eot_id|>",
    TEMPLATES["Llama 2"]: "</s>",
    EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}": "<|endoftext|>",  # ends by text alone
    EACH + "{{ m.role }}: {{ m.content }} END </s>{% endfor %}": "<|endoftext|>",  # text comes before the token
    EACH + "{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}": "<|endoftext|>",
    "{{ raise_exception('none') }}": "<|endoftext|>",
    "": "<|endoftext|>",
}


@pytest.mark.parametrize(("template", "end"), TURN_ENDS.items(), ids=range(len(TURN_ENDS)))
def test_sampling_stops_at_the_templates_end_too(template, end, with_template):
    tokenizer = with_template(template or None, eos="<|endoftext|>")
    if not template:
        tokenizer.tokenizer.chat_template = None
        tokenizer.stops = {tokenizer.own_eos}
        tokenizer.use_template({}, datetime.datetime.now())
    ids = {tokenizer.tokenizer.convert_tokens_to_ids(text) for text in (end, "<|endoftext|>")}
    assert tokenizer.stops == ids and tokenizer.decode([tokenizer.eos], special=True) == end
    tokenizer.use_template({}, datetime.datetime.now(), plain=True)
    assert tokenizer.stops == ids and tokenizer.decode([tokenizer.eos], special=True) == "<|endoftext|>"


def test_the_tokenizers_own_end_stays_where_weights_do_not_know_the_templates(tmp_path):
    checkpoint_of(tmp_path, TEMPLATES["ChatML"].replace("<|im_end|>", "<|eot_id|>"), "<|im_end|>")
    change_json(tmp_path / "config.json", vocab_size=291)
    assert ChatTokenizer(tmp_path).stops == {1}


# --- the tokens that were sampled


def said_by(monkeypatch, *answers):
    """Make model.py sample these ids, one answer after another."""

    def generate(self, tokens, most, ends, pad, temperature, generator, samples):
        some = [ids[:most] for ids in answers[:samples]]
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, some)), batch_first=True, padding_value=-1)

    monkeypatch.setattr(GPT, "generate", generate)


def sample(folder, *flags, problem="What is 1+1?", answer="2"):
    """The rows that full_scale.rollouts writes of one problem."""
    problems = write(folder / "problems.jsonl", {"problem": problem, "answer": answer})
    words = ["--model", folder, "--problems", problems, "--out", folder / "out.jsonl", "--max-tokens", 200, *flags]
    full_scale.rollouts.run([str(word) for word in words])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().split("\n")[:-1]]


def tokens_read(folder, tokenizer):
    """[(prompt ids, completion ids)] that training takes of the file that `sample` wrote."""
    rows = read_rollouts(folder / "out.jsonl", tokenizer)
    return [tokens_of(row, tokenizer, tokenizer.encode) for row in rows]


def test_a_base_checkpoint_stops_at_the_templates_end(tmp_path, monkeypatch):
    """The case `special-tokens-in-answers`, as Qwen2.5's base models are."""
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path, eos="<|endoftext|>"))
    turns = "<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n\\boxed{7}<|endoftext|>"
    said = tokenizer.encode(f"1+1=2. \\boxed{{2}}<|im_end|>\n{turns}", special=False)
    said_by(monkeypatch, said)
    (row,) = sample(tmp_path, "--n", 1)
    sampled = said[: said.index(1) + 1]
    assert (row["completion"], row["label"], row["finished"]) == ("1+1=2. \\boxed{2}", True, True)
    assert row["completion_ids"] == sampled and sampled[-1] == 1
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], sampled)]


def test_special_tokens_in_an_answer_are_kept(tmp_path, monkeypatch):
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path))
    said_by(monkeypatch, tokenizer.encode("<|im_start|>think</s> 1+1=2", special=False))
    (row,) = sample(tmp_path, "--n", 1)
    assert row["completion"] == "<|im_start|>think</s> 1+1=2" and not row["finished"] and "stop_reason" not in row
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], row["completion_ids"])]
    (bare,) = read_rollouts(write(tmp_path / "text", {**row, "completion_ids": None, "prompt_ids": None}), tokenizer)
    assert tokens_of(bare, tokenizer, tokenizer.encode) == (row["prompt_ids"], row["completion_ids"])


def test_a_template_without_a_bos_gets_none(tmp_path, monkeypatch):
    """As transformers does, and vLLM; a plain text gets the one that the tokenizer puts before it."""
    checkpoint_of(tmp_path, TEMPLATES["ChatML"])
    path = tmp_path / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(path))
    own.post_processor = tokenizers.processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    own.save(str(path))
    tokenizer = ChatTokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "system", "content": PROMPT}, user("What is 1+1?")]
    said_by(monkeypatch, [5, 1])
    (row,) = sample(tmp_path, "--n", 1)
    assert row["prompt_ids"] == theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], [5, 1])] and row["prompt_ids"][0] != 0
    (tmp_path / "out.jsonl").unlink()
    (row,) = sample(tmp_path, "--n", 1, "--no-template")
    assert row["prompt_ids"] == theirs.encode(row["prompt"]) and row["prompt_ids"][0] == 0
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], [5, 1])]


def test_spaces_in_an_answer_are_kept(tmp_path, monkeypatch):
    checkpoint_of(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=True)  # as Llama 3 has it
    tokenizer = ChatTokenizer(tmp_path)
    said_by(monkeypatch, tokenizer.encode("2 . It is n't 3 , is it ?", special=False))
    assert sample(tmp_path, "--n", 1)[0]["completion"] == "2 . It is n't 3 , is it ?"


def test_texts_stop_an_answer(tmp_path, monkeypatch):
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path))
    said = tokenizer.encode("\\boxed{2}.\n\nProblem:\nWhat is 3+4? It is 7.\n\nQ", special=False)
    said_by(monkeypatch, said)
    (row,) = sample(tmp_path, "--n", 1, "--stop", "\n\nQ", "blem:")
    assert (row["completion"], row["finished"], row["label"], row["stop_reason"]) == ("\\boxed{2}.\n\nPro", True, True, "blem:")
    ids = row["completion_ids"]
    assert ids == said[: len(ids)] and "blem:" in tokenizer.decode(ids) and "blem:" not in tokenizer.decode(ids[:-1])
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], ids)]  # no end after it that was not sampled


def test_model_py_ends_at_a_text(tmp_path):
    """Sampled with texts that stop, answers are those sampled without, cut."""
    checkpoint_of(tmp_path)
    flags = ["--n", 6, "--max-tokens", 40]
    whole = sample(tmp_path, *flags)
    letter = max("etaoin", key=lambda letter: sum(letter in row["completion"] for row in whole))
    (tmp_path / "out.jsonl").unlink()
    cut = sample(tmp_path, *flags, "--stop", letter, "a text that nobody says")
    assert any(letter in row["completion"] for row in whole)
    for before, row in zip(whole, cut):
        assert row["completion"] == before["completion"].split(letter)[0]
        assert row["completion_ids"] == before["completion_ids"][: len(row["completion_ids"])]
        assert ("stop_reason" in row) == (letter in before["completion"])


def test_a_text_of_several_tokens_ends_generation(tmp_path):
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path))
    ends = text_ends(tokenizer, ["\n\nQ: é", "x"], "cpu")
    ids = [tokenizer.encode(f"2{text}", special=False) for text in ("\n\nQ: é", "\n\nQ: e", "x")]
    assert len(ids[0]) > 5
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.encode(".", special=False)[0]] * (width - len(some)) + some for some in ids])
    assert ends(padded).tolist() == [True, False, True]
    ended = torch.tensor([[5, 1], [1, -1], [5, 5]])
    assert ends(ended).tolist() == [True, False, False]  # the second has ended before


def test_generation_itself_ends_at_a_text(tmp_path, monkeypatch):
    """Not only is the answer cut: nothing is sampled behind the end."""
    widths, generate = [], GPT.generate

    def watched(*arguments):
        widths.append(generate(*arguments).ge(0).any(0).sum().item())
        return generate(*arguments)

    checkpoint_of(tmp_path)
    monkeypatch.setattr(GPT, "generate", watched)
    (row,) = sample(tmp_path, "--n", 1, "--stop", *"abcdefghijklmnopqrstuvwxyz0123456789\\ ")
    assert widths == [len(row["completion_ids"])] and row["finished"] and widths[0] < 200


def test_vllm_is_asked_and_heard_the_same_way(tmp_path, monkeypatch):
    """A stand-in for vLLM, whose answers have the tokens that ended them."""
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path, eos="<|endoftext|>"))
    said = [tokenizer.encode(text, special=False) for text in ("\\boxed{2}<|im_end|>", "2, Q: 3", "<|im_start|>2")]
    seen = []

    class LLM:
        def __init__(self, **words):
            seen.append(words)

        def generate(self, prompts, params):
            seen.extend([*prompts, *params])
            answers = [SimpleNamespace(token_ids=tuple(ids)) for ids in said]
            return [SimpleNamespace(outputs=answers[: words["n"]]) for words in params]

    def params(**words):
        assert words["temperature"] or words["n"] == 1  # vLLM raises ValueError
        return words

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=params))
    args = SimpleNamespace(gpus=1, temperature=1.0, max_tokens=9)
    asked = SimpleNamespace(template=True, template_arg=[], stop=[], shots=[])
    full_scale.rollouts.vllm_sampler(args, asked, tmp_path, datetime.datetime.now())[0]([[1], [2], [3]], [3, 1, 2], 5)
    taken = [seed for words in seen[4:] for seed in range(words["seed"], words["seed"] + words["n"])]
    assert len(taken) == len(set(taken)) == 6  # vLLM counts on from a prompt's seed
    args.temperature = 0
    greedy = full_scale.rollouts.vllm_sampler(args, asked, tmp_path, datetime.datetime.now())[0]([[1], [2]], [3, 1], 5)
    assert greedy == [[said[0]] * 3, [said[0]]]
    seen.clear()
    rows = sample(tmp_path, "--n", 3, "--engine", "vllm", "--gpus", 2, "--stop", "Q:")
    assert seen[0] == {"model": str(tmp_path), "tensor_parallel_size": 2}
    assert seen[1] == {"prompt_token_ids": tokenizer.encode(tokenizer.ask("What is 1+1?"), special=False)}
    asked = {"n": 3, "stop": ["Q:"], "stop_token_ids": sorted(tokenizer.stops), "skip_special_tokens": False, "max_tokens": 200}
    assert seen[2].items() >= asked.items() and len(tokenizer.stops) == 2
    assert [(row["completion"], row["finished"]) for row in rows] == [
        ("\\boxed{2}", True),
        ("2, ", True),
        ("<|im_start|>2", False),
    ]
    assert [row["completion_ids"] for row in rows[::2]] == said[::2] and rows[1]["stop_reason"] == "Q:"
    assert tokens_read(tmp_path, tokenizer) == [(row["prompt_ids"], row["completion_ids"]) for row in rows]


# --- tokenizers that begin a text otherwise than they go on


def sentencepiece(**options):
    """A tokenizer.json as Llama 2 has: a space before every text, bytes for what it does not know."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *bytes_], show_progress=False)
    text = ROLLOUTS.read_text() + " First 2+3=5. What is the next? Please reason step by step. The answer is 5. boxed" * 5
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace():
    tokenizer = sentencepiece()
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def both_ends():
    """Some put an end behind every text too, which no prompt may have."""
    tokenizer = sentencepiece()
    ends = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = ends
    return tokenizer


TOKENIZERS = {
    "byte level": (None, None),
    "SentencePiece": (sentencepiece, "PreTrainedTokenizerFast"),
    "SentencePiece, Llama's class": (sentencepiece, "LlamaTokenizer"),
    "Metaspace": (metaspace, "PreTrainedTokenizerFast"),
    "an end behind every text": (both_ends, "PreTrainedTokenizerFast"),
}


@pytest.fixture(scope="module")
def every_tokenizer(tmp_path_factory):
    found = {}
    for name, (make, kind) in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        if make:
            make_checkpoint(folder, "Llama", vocab_size=600, bos_token_id=1, eos_token_id=2)
            make().save(str(folder / "tokenizer.json"))
            words = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(words))
        else:
            checkpoint_of(folder)
        found[name] = folder, ChatTokenizer(folder)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["First 2+3=5. \\boxed{5}", "\nFirst", "5", " 5", "é 5", "▁5", "\n\n5 "])
def test_an_answer_is_tokenised_in_its_place(name, text, every_tokenizer, tmp_path):
    """The case `sentencepiece-first-token`."""
    folder, tokenizer = every_tokenizer[name]
    for prompt in ("What is 2+3?\n", "What is 2+3?", "2+3="):
        joint = tokenizer.tokenizer.encode(prompt + text, add_special_tokens=False)
        alone = tokenizer.tokenizer.encode(prompt, add_special_tokens=False)
        row = {"prompt": prompt, "completion": text, "label": True, "finished": False, "chat": False}
        prompt_ids, ids = tokens_of(row, tokenizer, tokenizer.encode)
        assert prompt_ids == tokenizer.encode(prompt) and 2 not in prompt_ids
        if joint[: len(alone)] == alone:
            assert ids == joint[len(alone) :]
        if name != "Metaspace" or "▁" not in text:  # which reads one as a space
            assert tokenizer.decode_after(prompt_ids, ids) == text.replace("▁", " " if name != "byte level" else "▁")


SAMPLED = st.lists(st.integers(0, 599), min_size=1, max_size=12)


@given(sampled=st.lists(SAMPLED, min_size=1, max_size=3), problem=SAID, stops=st.lists(st.sampled_from("e5 \n."), max_size=2))
@EXAMPLES
def test_the_tokens_trained_are_the_tokens_sampled(sampled, problem, stops, every_tokenizer, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "out.jsonl"
    for name, (_, tokenizer) in every_tokenizer.items():
        prompt = tokenizer.ask(problem)
        prompt_ids = tokenizer.encode(prompt, special=tokenizer.plain)
        lines, expected = [], []
        for ids in ([token % tokenizer.vocab_size for token in ids] for ids in sampled):
            answer = answer_of(ids, prompt_ids, tokenizer, stops)
            kept = answer["completion_ids"]
            assert kept == ids[: len(kept)] and (answer["finished"] or kept == ids)
            lines.append({"prompt": prompt, **answer, "prompt_ids": prompt_ids, "label": True})
            expected.append((prompt_ids, kept))
        rows = read_rollouts(write(path, *lines), tokenizer)
        assert [tokens_of(row, tokenizer, tokenizer.encode) for row in rows] == expected, name


WRONG_IDS = {
    "of another completion": ({"completion_ids": [5, 6]}, "completion_ids spell "),
    "beyond the vocabulary": ({"completion_ids": [10**9]}, "completion_ids is [1000000000], not token ids below 320"),
    "negative": ({"completion_ids": [-1]}, "completion_ids is [-1], not token ids"),
    "of another kind": ({"completion_ids": "12"}, 'completion_ids is "12", not token ids'),
    "true": ({"completion_ids": [True]}, "completion_ids is [true], not token ids"),
    "of another prompt": ({"prompt_ids": [5, 6]}, "prompt_ids are not the prompt's tokens"),
    "of no prompt": ({"prompt_ids": []}, "prompt_ids are not the prompt's tokens"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG_IDS.values(), ids=WRONG_IDS)
def test_tokens_that_are_not_the_texts_are_refused(fields, message, tmp_path):
    checkpoint_of(tmp_path)
    with pytest.raises(UserError) as caught:
        trained(tmp_path, [{"prompt": "Hi?", "completion": "yes", "label": True, **fields}])
    assert f"1 of 1 lines are bad: line 1: {message}" in str(caught.value) and "\n" not in str(caught.value)


# --- fields of messages

WRITES = {  # templates that write more than content, abridged
    "reasoning, as Qwen3's": (
        EACH + "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASSISTANT,
        assistant("yes", reasoning_content="because"),
        "<think>\nbecause\n</think>\n\nyes<|im_end|>",
    ),
    "tool calls": (
        EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}<call>{{ call.function|tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}" + ASSISTANT,
        {"role": "assistant", "tool_calls": [{"function": {"name": "calc"}}]},
        '<call>{"name": "calc"}<|im_end|>',
    ),
    "content after a start of the template's": (
        EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}" + ASSISTANT,
        assistant("yes"),
        "<think>\n\n</think>\n\nyes<|im_end|>",
    ),
    "an end after a space": (TEMPLATES["Llama 2"], assistant("yes"), " yes </s>"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "answer", "completion"), WRITES.values(), ids=WRITES)
def test_fields_of_a_message_are_written_by_the_template(template, answer, completion, tmp_path):
    checkpoint_of(tmp_path, template, "<|endoftext|>")
    rows = trained(tmp_path, [{"prompt": [user("Hi?")], "chosen": [answer], "rejected": "no"}])
    assert rows[0] == (ChatTokenizer(tmp_path).render([user("Hi?")]), completion)


def test_a_prompt_that_the_template_takes_back_is_cut(tmp_path):
    """A generation prompt that opens a thought, which a finished answer has not; never into the answer itself."""
    template = EACH + CHATML + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    checkpoint_of(tmp_path, template)
    rows = trained(tmp_path, [{"prompt": [user("Hi?")], "chosen": [assistant("yes")], "rejected": [assistant("<3")]}])
    prompt = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert rows == [(prompt, "yes<|im_end|>"), (prompt, "<3<|im_end|>")]


def test_an_answer_that_the_template_cuts_is_refused(tmp_path):
    checkpoint_of(tmp_path, EACH + CHATML.replace("m.content", "m.content.split('</think>')[-1]") + "{% endfor %}" + ASSISTANT)
    with pytest.raises(UserError, match='the chat template does not write all of the answer "because</think>yes"'):
        trained(tmp_path, [{"prompt": [user("Hi?")], "chosen": [assistant("because</think>yes")], "rejected": "no"}])


def test_an_answer_that_the_prompt_has_begun_goes_on(tmp_path):
    checkpoint_of(tmp_path, TEMPLATES["ChatML"])
    begun = [user("Hi?"), assistant("I say")]
    prompt = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nI say"
    for chosen, rejected in ((" yes", " no"), ([assistant(" yes")], [assistant(" no")])):
        rows = trained(tmp_path, [{"prompt": begun, "chosen": chosen, "rejected": rejected}])
        assert rows == [(prompt, " yes<|im_end|>"), (prompt, " no<|im_end|>")]


def test_tools_and_words_of_a_line_go_to_the_template(tmp_path):
    template = "{% if tools %}{{ tools|tojson }}{% endif %}{{ enable_thinking }}" + TEMPLATES["ChatML"]
    checkpoint_of(tmp_path, template)
    row = {
        "prompt": [user("Hi?")],
        "chosen": [assistant("yes")],
        "rejected": "no",
        "chat_template_kwargs": {"enable_thinking": 3},
    }
    for tools in ([{"a": 1}], '[{"a": 1}]'):
        prompts = {prompt for prompt, _ in trained(tmp_path, [{**row, "tools": tools}])}
        assert prompts == {'[{"a": 1}]3<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n'}


# --- the command


def test_the_first_runs_date_is_kept(tmp_path, monkeypatch):
    checkpoint_of(tmp_path, "{{ strftime_now('%H:%M:%S.%f') }}" + TEMPLATES["ChatML"])
    first = sample(tmp_path, "--n", 2)
    assert len({row["prompt"] for row in first}) == 1
    (tmp_path / "out.jsonl").write_text((tmp_path / "out.jsonl").read_text().split("\n")[0] + "\n")
    assert [row["prompt"] for row in sample(tmp_path, "--n", 2)] == [row["prompt"] for row in first]
    change_json(tmp_path / "out.jsonl.json", date="today")
    with pytest.raises(SystemExit):
        sample(tmp_path, "--n", 2)


def test_training_keeps_the_first_runs_date(tmp_path):
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path, "{{ strftime_now('%H:%M:%S.%f') }}" + TEMPLATES["ChatML"]))
    first = first_date(tokenizer, tmp_path)
    assert first_date(tokenizer, tmp_path) == first < datetime.datetime.now()
    change_json(tmp_path / "date.json", date=3)
    with pytest.raises(UserError, match="date.json: no date; remove it to take today's"):
        first_date(tokenizer, tmp_path)
    (tmp_path / "date.json").unlink()
    rows = [{"prompt": [user(f"{i}?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]} for i in range(4)]
    data, said = write(tmp_path / "rows", *rows), []
    for _ in range(2):
        done = run_module("train", "--init", tmp_path, "--data", data, "--out", tmp_path / "runs", *QUICK, "--steps", 1)
        assert done.returncode == 0, done.stderr
        said.append("already finished" in done.stdout)
    assert said == [False, True]
    first_date(ChatTokenizer(checkpoint_of(tmp_path, TEMPLATES["ChatML"])), tmp_path)
    assert not (tmp_path / "date.json").exists()


def test_shots_come_from_a_file_of_either_kind(tmp_path, capsys):
    checkpoint_of(tmp_path)
    math = write(
        tmp_path / "math", {"problem": "1+1?", "solution": "It is \\boxed{2}.", "answer": "2"}, {"problem": "a", "answer": "b"}
    )
    (row,) = sample(tmp_path, "--n", 1, "--shots", math, 1, "--no-template", "--max-tokens", 3)
    assert row["prompt"] == "Problem:\n1+1?\n\nSolution: It is \\boxed{2}.\n\nProblem:\nWhat is 1+1?\n\nSolution:"
    (tmp_path / "out.jsonl").unlink()
    (row,) = sample(tmp_path, "--n", 1, "--shots", math, 2, "--max-tokens", 3, "--system", "Solve.")
    assert "It is \\boxed{2}.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>" in row[
        "prompt"
    ].replace("\n\n", "\n")
    assert row["prompt"].startswith("<|im_start|>system\nSolve.<|im_end|>")
    with pytest.raises(SystemExit) as stop:
        sample(tmp_path, "--n", 1, "--shots", math, 3)
    assert stop.value.code == 2 and f"{math}: has 2 lines, and --shots asks for 3" in capsys.readouterr().err


def test_plain_shots_stop_before_the_next_problem(tmp_path, monkeypatch):
    tokenizer = ChatTokenizer(checkpoint_of(tmp_path))
    shots = write(tmp_path / "shots", {"problem": "1+1?", "answer": "2"})
    said_by(monkeypatch, tokenizer.encode(" It is 2.\n\nProblem:\nIt is 7.", special=False))
    (row,) = sample(tmp_path, "--n", 1, "--shots", shots, 1, "--no-template")
    assert row["completion"] == " It is 2.\n\n" and row["finished"] and row["label"]


def test_more_tokens_than_positions_are_said(tmp_path, capsys):
    checkpoint_of(tmp_path, max_position_embeddings=200)
    sample(tmp_path, "--n", 1, "--max-tokens", 3)
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "out.jsonl").unlink()
    ids = sample(tmp_path, "--n", 1, "--max-tokens", 150)[0]["prompt_ids"]
    said = f"warning: the longest prompt and --max-tokens are {len(ids) + 150} tokens, and the model's positions 200\n"
    assert said in capsys.readouterr().out


def test_the_templates_words_are_flags(tmp_path):
    words = "{{ enable_thinking is false }} {{ n + 1 }} {{ who }}"
    checkpoint_of(tmp_path, words + TEMPLATES["ChatML"])
    flags = ["--template-arg", "enable_thinking=false", "--template-arg", "n=2", "--template-arg", "who=Ann=B"]
    (row,) = sample(tmp_path, "--n", 1, "--max-tokens", 3, *flags)
    assert row["prompt"].startswith("True 3 Ann=B<|im_start|>system")


BAD_ASKING = {
    "--template-arg x": "argument --template-arg: must be NAME=VALUE with a name that the template reads, not 'x'",
    "--template-arg =1": "argument --template-arg: must be NAME=VALUE",
    "--template-arg messages=1": "argument --template-arg: must be NAME=VALUE",
    "--template-arg tokenize=true": "argument --template-arg: must be NAME=VALUE",
    "--stop ~": "argument --stop: must not be empty",
    "--shots file": "argument --shots: expected 2 arguments",
    "--shots file 0": "argument --shots: must be a whole number from 1",
    "--shots nowhere 1": "nowhere: No such file",
}


@pytest.mark.parametrize(("flags", "message"), BAD_ASKING.items(), ids=BAD_ASKING)
def test_a_bad_way_to_ask_is_one_line(flags, message, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    with pytest.raises(SystemExit) as stop:
        sample(folder, *(word.replace("~", "") for word in flags.split()))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not list(folder.glob("out*"))


# --- the docs


def test_the_docs_say_what_becomes_of_every_template(with_template, tmp_path):
    rows = table(Path("docs/full_scale.md"), "template")
    chat, plain = "<|im_start|>user\n1?{}<|im_end|>\n", f"1?\n{PROMPT}\n"
    without = with_template()
    without.tokenizer.chat_template = None
    without.use_template({}, datetime.datetime.now())
    date = with_template("{{ strftime_now('%Y') }}" + TEMPLATES["ChatML"])
    date.use_template({}, datetime.datetime(1999, 1, 1))
    refused = [(several, {"folder": checkpoint_of(tmp_path / "several"), "rag": "x"}), (with_template, {"template": "x"})]
    expected = {
        "with a system role": with_template(TEMPLATES["ChatML"])
        .ask("1?")
        .startswith(f"<|im_start|>system\n{PROMPT}<|im_end|>\n")
        and with_template(TEMPLATES["ChatML"]).ask("1?").count(chat.format("")) == 1,
        "refuses the system role, or leaves it out": all(
            with_template(SYSTEM[name]).ask("1?") == chat.format(f"\n{PROMPT}") for name in ("refused", "left out")
        ),
        "none": without.ask("1?") == plain,
        "several without a default": "chat_template=NAME" in refusal(*refused[0]),
        "with the date": date.ask("1?").startswith("1999<"),
        "leaves out the problem": "leaves out content" in refusal(*refused[1]),
    }
    assert [row[0] for row in rows] == list(expected) and all(expected.values()), expected


def refusal(make, words):
    with pytest.raises(UserError) as caught:
        make(**words).ask("1?")
    return str(caught.value)
