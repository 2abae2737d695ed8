"""Nothing is let in: readers on random and hostile input, bad command lines and files, and no way to run a stranger's code."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import hypothesis
import pytest
import torch
from conftest import ROOT
from hypothesis import strategies as st
from safetensors.torch import save
from test_full_scale import BAD_LINES, BAD_PROBLEMS, DAMAGES, HOSTILE
from test_full_scale_files import BAD_FILES, BAD_SHAPES
from test_full_scale_gym import BAD_GYM
from test_full_scale_prompts import BAD_ASKING, WRONG_IDS
from test_full_scale_strangers import OTHERS, REMOTE
from test_full_scale_training import BAD_COMMANDS
from test_full_scale_weights import BAD_GGUF, BAD_TENSORS, PROPERTIES, STRANGE
from test_interruption import KILLS
from test_train import BAD_FLAGS, TINY, edit_cache, refusal

import plots
import toy_math.__main__
import train
from full_scale.load_hf import find_tensors
from full_scale.published import empty_model
from full_scale.published import gpt_config as published_config
from model import GPTConfig
from plumbing import files, keeper
from study import experiments, results
from toy_math.problems import Problem, read_problem, verify, write_trace
from toy_math.rollouts import pack, read_rows
from toy_math.tokenizer import ALPHABET, decode, encode

EXAMPLES = 300  # inputs that each property is tried on
SIZE = 1000  # bytes, the longest
hypothesis.settings.register_profile("quiet", max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("quiet")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
)
NOISE = st.binary(max_size=SIZE)
anything = hypothesis.given


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("noise")


def refused_or(function, *arguments):
    """A reader either reads or raises UserError in one line; nothing else."""
    try:
        return function(*arguments)
    except files.UserError as error:
        assert "\n" not in str(error) and str(error)


# --- properties


@anything(st.text(alphabet=ALPHABET, max_size=200) | st.text(max_size=200))
def test_the_tokenizer_returns_the_text_or_refuses_it(text):
    if set(text) <= set(ALPHABET):
        assert decode(encode(text) + [18]) == (text, True) and len(encode(text)) == len(text)
    else:
        with pytest.raises(ValueError, match="is not in the alphabet"):
            encode(text)


PROBLEMS = st.builds(
    Problem,
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(2, 9)), min_size=1, max_size=8).map(tuple),
)


@anything(PROBLEMS, st.text(alphabet=ALPHABET + "x\n٣", max_size=80), st.booleans(), st.data())
def test_the_verifier_takes_any_text_and_only_the_answer_for_correct(problem, text, ended, data):
    assert read_problem(problem.prompt) == problem
    verdict, clean = verify(problem, text, ended), write_trace(problem)[0]
    assert not verdict.correct or (text[-2:] == clean[-2:] and len(text) == len(clean) and ended)
    assert verify(problem, clean).correct and not verify(problem, clean, False).correct
    at = data.draw(st.integers(0, len(clean) - 1))
    changed = clean[:at] + data.draw(st.sampled_from([c for c in ALPHABET if c != clean[at]])) + clean[at + 1 :]
    assert verify(problem, changed).first_wrong_step == min(at // 8 + 1, len(problem.ops) + 1)
    assert not verify(problem, clean[:at]).correct


@anything(st.text(max_size=30))
def test_a_prompt_is_read_or_refused(text):
    try:
        assert read_problem(text).prompt == text
    except ValueError as error:
        assert "\n" not in str(error)


@anything(st.lists(NOISE | JSON.map(lambda x: json.dumps(x).encode()), max_size=5).map(b"\n".join))
def test_lines_of_noise_are_read_or_refused(place, content):
    path = place / "rows.jsonl"
    path.write_bytes(content)
    rows = refused_or(files.read_lines, path, lambda row: row)
    assert rows is None or all(isinstance(row, dict) for row in rows)
    refused_or(read_rows, path)
    refused_or(files.read_json, path)


ROW = {"prompt": "47+8*3?", "completion": "47+8=55;55*3=65;#65", "label": True, "problem_id": 0, "malformed": False}
ROW |= {"first_wrong_step": None, "finished": True}


@anything(st.fixed_dictionaries({}, optional={name: JSON for name in ROW}))
def test_rows_with_anything_in_their_fields_are_read_or_refused(place, fields):
    path = place / "rows.jsonl"
    path.write_text(json.dumps({**ROW, **fields}))
    rows = refused_or(read_rows, path)
    if rows:
        pack(rows)  # what is let in can be trained on


MODEL = GPTConfig(vocab_size=8, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=4)
WEIGHTS = save({f"model.{name}": torch.zeros(t.shape) for name, t in empty_model(MODEL).state_dict().items()})


@anything(NOISE | st.tuples(st.integers(0, len(WEIGHTS) - 1), st.binary(min_size=1, max_size=16)))
def test_weights_of_noise_are_read_or_refused(place, change):
    content = change if isinstance(change, bytes) else WEIGHTS[: change[0]] + change[1] + WEIGHTS[change[0] + len(change[1]) :]
    (place / "model.safetensors").write_bytes(content)
    refused_or(find_tensors, place, empty_model(MODEL))
    path = place / "checkpoint.safetensors"
    path.write_bytes(content)
    model = empty_model(MODEL).to_empty(device="cpu")
    refused_or(keeper.load_checkpoint, path, model, keeper.adamw(model.parameters(), 1e-3))


@anything(NOISE, NOISE | JSON.map(lambda x: json.dumps(x).encode()))
def test_logs_of_noise_are_read_or_left_out(place, log, config):
    (place / "log.csv").write_bytes(log)
    (place / "config.json").write_bytes(config)
    with pytest.raises((ValueError, files.UserError)):
        results.read_run(place)


@anything(st.integers(0, 3000), NOISE)
def test_a_torn_log_is_never_read(finished, place, cut, noise):
    source = next(finished[0].glob("fpa-*"))
    content = (source / "log.csv").read_bytes()
    (place / "config.json").write_bytes((source / "config.json").read_bytes())
    (place / "log.csv").write_bytes(content[: min(cut, len(content) - 1)])
    with pytest.raises(ValueError):
        results.read_run(place)
    (place / "log.csv").write_bytes(content + noise)
    if noise.strip(b"\r\n\x1c\x1d\x1e\x85\x0b\x0c "):
        try:
            log = results.read_run(place).log
        except ValueError:
            return
        assert noise.endswith(b"\n") and len(log["step"]) > 3  # whole lines of as many cells are a log's


SETTINGS = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SETTINGS |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings")


@anything(st.fixed_dictionaries({}, optional={name: JSON | st.integers(1, 2**70) for name in (*SETTINGS, *OPTIONAL)}))
def test_a_config_with_anything_in_it_is_read_or_refused(place, fields):
    (place / "config.json").write_text(json.dumps({**SETTINGS, **fields}))
    refused_or(published_config, place)


# --- lines, fields, checksums


def test_the_first_ten_bad_lines_are_named_and_the_rest_counted(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    lines = ['{"n": 1}', "{", "[1]", '{"n": "x"}', "{}"] + ["no"] * 8 + ["", '{"n": 2}']
    path.write_text("\n".join(lines))
    with pytest.raises(files.UserError) as error:
        files.read_lines(path, lambda row: files.field(row, "n", int))
    text = str(error.value)
    assert text.startswith(f"{path}: 12 of 14 lines are bad: line 2: not JSON: ") and text.endswith("; and 2 more")
    assert '; line 3: not a JSON object; line 4: n is "x", not a whole number; line 5: no n; line 6: ' in text
    assert len(re.findall(r"[:;] line \d+: ", text)) == 10 and "\n" not in text
    assert files.read_lines(path, lambda row: files.field(row, "n", int), skip_bad=True) == [1, 2]
    assert capsys.readouterr().out == f"left out      {text}\n"
    path.write_text("no\nno\n")
    with pytest.raises(files.UserError, match="2 of 2 lines are bad"):
        files.read_lines(path, dict, skip_bad=True)  # nothing would be left


BAD_ROWS = {
    "not JSON": ("{", "not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "half a character": ('{"prompt": "\\ud800"}', "not UTF-8"),
    "nested": ("[" * 100_000, "nested too deep"),
    "not an object": ("[1]", "not a JSON object"),
    "no prompt": ({"prompt": ...}, "no prompt"),
    "no completion": ({"completion": ...}, "no completion"),
    "no label": ({"label": ...}, "no label"),
    "label": ({"label": 1}, "label is 1, not true or false"),
    "number for a text": ({"completion": 5}, "completion is 5, not a text"),
    "long value": ({"label": "x" * 10**6}, 'label is "' + "x" * 39 + "…, not"),
    "problem id": ({"problem_id": 1.5}, "problem_id is 1.5, not a whole number"),
    "negative problem id": ({"problem_id": -1}, "problem_id is -1, below 0"),
    "first wrong step": ({"first_wrong_step": "2"}, 'first_wrong_step is "2", not a whole number'),
    "finished": ({"finished": None}, "finished is null, not true or false"),
    "empty": ({"completion": "", "finished": False}, "a completion of 0 tokens"),
    "over-long": ({"completion": "1" * 50}, "a completion of 51 tokens, not 1 to 20"),
    "alphabet": ({"completion": "47+8=5S"}, "character 'S' at position 6 is not in the alphabet"),
    "other digits": ({"prompt": "4٧+8?"}, "not a start, operations and ?"),
    "no problem": ({"prompt": "how?"}, "prompt is 'how?', not a start"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_of_the_toy_is_named(change, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    if isinstance(change, dict):
        change = json.dumps({name: value for name, value in {**ROW, **change}.items() if value is not ...})
    change = change if isinstance(change, bytes) else change.encode()
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + change + b"\n")
    with pytest.raises(files.UserError) as error:
        read_rows(path)
    assert f"{path}: 1 of 2 lines are bad: line 2: " in str(error.value) and message in str(error.value)


def test_rows_of_problems_of_two_lengths_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "prompt": "47+8?", "completion": "#55"}))
    with pytest.raises(files.UserError, match="problems of different lengths"):
        read_rows(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "none"])
def test_what_is_no_file_is_named(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "empty": path.touch, "none": lambda: None}[kind]()
    expected = {"folder": "not a file", "pipe": "not a file", "empty": "empty", "none": "No such file or directory"}[kind]
    with pytest.raises(files.UserError, match=f"^{path}: {expected}$"):
        files.read_lines(path, dict)


def test_a_cache_whose_facts_were_edited_is_refused(tmp_path):
    path = tmp_path / "rollouts-1.jsonl"
    path.write_text("{}\n")
    files.write_beside(path, {"share_correct": 0.1 + 0.2, "seconds": 1})
    assert files.read_beside(path) == {"share_correct": 0.1 + 0.2, "seconds": 1}
    for old, new in (('"seconds": 1', '"seconds": 2'), ('"seconds": 1,', ""), ("{", '{"more": 1,')):
        text = path.with_suffix(".json").read_text()
        path.with_suffix(".json").write_text(text.replace(old, new))
        with pytest.raises(files.UserError, match=f"^{path}: damaged or edited"):
            files.read_beside(path)
        path.with_suffix(".json").write_text(text)


def test_a_bad_row_in_the_toys_cache_is_named_before_any_work(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("rollouts-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    edit_cache(tmp_path, lambda text: text.replace(lines[4], lines[4].replace('"label": ', '"label": 0.'), 1))
    code, error = refusal(train.run, ["--loss", "fpa", *TINY, "--out", tmp_path], capsys)
    assert code == 2 and f"{path}: 1 of 96 lines are bad: line 5: " in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# --- commands on files


BAD_RUNS = {
    "no run": ({}, "no finished run below"),
    "not JSON": ({"config.json": "{"}, "no finished run below"),
    "another version": ({"config.json": '{"format": 1}'}, "was written by another version: format 1"),
    "a list": ({"config.json": "[]"}, "no finished run below"),
    "a log of noise": ({"log.csv": "\x00\x01"}, "no finished run below"),
    "an empty log": ({"log.csv": ""}, "no finished run below"),
    "not UTF-8": ({"log.csv": b"\xff\n"}, "no finished run below"),
    "a log without steps": ({"log.csv": "accuracy\n1\n"}, "no finished run below"),
    "a log without a column": ({"log.csv": lambda text: text.replace("accuracy_greedy", "greedy")}, "no finished run below"),
    "a word in the log": ({"log.csv": lambda text: text.replace("\n5,", "\n5,low", 1)}, "no finished run below"),
    "a long cell": ({"log.csv": lambda text: text.replace("\n5,", f"\n{'5' * 200_000},", 1)}, "no finished run below"),
    "brackets": ({"config.json": "[" * 10**5}, "no finished run below"),
    "a torn table": ({"entanglement.csv": "step,cosine\n0,0."}, "no finished run below"),
    "no lr": ({"config.json": lambda text: text.replace('"lr"', '"rate"')}, "no finished run below"),
    **{
        f"another {name}": ({"config.json": lambda text, n=name, v=value: edited(text, n, v)}, "no finished run below")
        for name, value in {
            "lr": "x", "loss": "ppo", "seed": [1], "beta": "x", "lam": "x", "steps": None, "target": [1],
        }.items()
    },
}  # fmt: skip


def edited(text, name, value):
    return json.dumps({**json.loads(text), name: value})


@pytest.mark.parametrize(("change", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_logs_are_named(change, message, finished, tmp_path, capsys):
    source = next(finished[0].glob("fpa-*"))
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    for name in {"config.json", "log.csv", *change} if change else ():
        content = change.get(name, lambda text: text)
        content = content((source / name).read_text()) if callable(content) else content
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, error = refusal(plots.run, [tmp_path / "runs", "--to", tmp_path / "figures"], capsys)
    lines = error.splitlines()
    assert code == 2 and message in lines[-1] and all(line.startswith("left out ") for line in lines[:-1])
    assert len(lines) == 1 + (bool(change) and "version" not in message) and not (tmp_path / "figures").exists()


@pytest.mark.parametrize("argument", ["--seed x", "--task foo", "--nonsense"])
def test_bad_arguments_of_toy_math(argument, capsys):
    code, error = refusal(toy_math.__main__.run, argument.split(), capsys)
    assert code == 2 and argument.split()[0] in error and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("words", "code", "lines"),
    [("study.experiments > /dev/full", 2, 1), ("toy_math | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, 0)],
)
def test_output_that_goes_nowhere(words, code, lines):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m {words}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") == lines, done.stderr


def test_a_table_that_is_gone_or_a_folder_that_is_a_file_is_named_before_any_work(tmp_path, capsys):
    shutil.copytree(ROOT / "results" / "slips", tmp_path / "results")
    (tmp_path / "results" / "curves.csv").unlink()
    code, error = refusal(plots.run, [tmp_path / "results"], capsys)
    assert code == 2 and error == f"plots.py: error: {tmp_path / 'results' / 'curves.csv'}: no such file\n"
    (tmp_path / "file").touch()
    for flag in ("--to", "--out"):
        code, error = refusal(experiments.run, ["main", flag, tmp_path / "file"], capsys)
        assert code == 2 and f"argument {flag}: {tmp_path / 'file'} is not a folder" in error and error.count("\n") == 1


# --- no way to run a stranger's code


FORBIDDEN = re.compile(
    r"(?:\b|_)(pickle|cPickle|dill|joblib|marshal|shelve|yaml)\b|\b(trust_remote_code|weights_only|AutoModel\w*)\b"
)


def test_nothing_that_can_run_code_is_read():
    """No pickle, eval, exec, torch.load or remote code but in the tests, which read no stranger's file.

    grade.py and leaderboard.py run what a student wrote.
    The programs of examples/ load a model as transformers' users do, from safetensors alone.
    """
    apart, folders = {"grade.py", "leaderboard.py"}, {"tests", "examples"}
    sources = [path for path in ROOT.rglob("*.py") if not folders & {*path.parts} and path.name not in apart]
    loads = re.findall(r"AutoModel\w*\.from_pretrained\(([^)]*)\)", (ROOT / "examples" / "own_loop.py").read_text())
    assert len(loads) == 1 and "use_safetensors=True" in loads[0] and "trust_remote_code" not in loads[0]
    assert len(sources) > 15
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.keyword: "arg"}
            name = getattr(node, names.get(type(node), "_"), None) or ""
            denied = isinstance(node, ast.keyword) and ast.unparse(node) == "trust_remote_code=False"
            assert denied or not FORBIDDEN.search(name), (path, name)
            assert not isinstance(node, ast.ImportFrom) or "load" not in [alias.name for alias in node.names], path  # torch's
            if isinstance(node, ast.Call):
                if re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):  # else transformers asks at the terminal
                    words = {ast.unparse(word) for word in node.keywords}
                    assert words >= {"trust_remote_code=False", "local_files_only=True"}, (path, words)
                assert ast.unparse(node.func) not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "torch.load",
                    "torch.jit.load",
                ), path


def test_the_docs_count_what_is_tried():
    tables = (BAD_FLAGS, BAD_ROWS, BAD_RUNS, BAD_COMMANDS, BAD_LINES, BAD_PROBLEMS, DAMAGES, HOSTILE)
    tables += (BAD_FILES, BAD_SHAPES, BAD_ASKING, WRONG_IDS, BAD_GGUF, BAD_TENSORS, STRANGE, OTHERS, REMOTE, BAD_GYM)
    count = sum(map(len, tables))
    page = (ROOT / "docs" / "robustness.md").read_text()
    assert count >= 60 and f"| {count} bad command lines and files" in page
    properties = sum(hasattr(function, "hypothesis") for name, function in globals().items() if name.startswith("test_"))
    properties += len(PROPERTIES)
    assert f"| {KILLS} kills (SIGKILL)" in page
    assert f"| {properties} readers and checks on {EXAMPLES} generated inputs each, up to {SIZE:,} bytes" in page
