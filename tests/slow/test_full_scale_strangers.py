"""What transformers would do with a stranger's files and is not let: run code, open other files, ask, call, take memory."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
from conftest import ROOT
from test_full_scale import change_config, change_json

from full_scale.gguf_file import NAME
from full_scale.load_hf import ChatTokenizer, load_pretrained
from plumbing.files import UserError

CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass Y: pass\n"


def settings(folder, **changes):
    change_json(folder / "tokenizer_config.json", **changes)


REMOTE = {
    "config": lambda f: change_config(f, auto_map={"AutoConfig": "x.Y"}),
    "config of a repository": lambda f: change_config(f, auto_map={"AutoConfig": "evil/repo--x.Y"}),
    "model": lambda f: change_config(f, auto_map={"AutoModelForCausalLM": "x.Y"}),
    "tokenizer": lambda f: settings(f, auto_map={"AutoTokenizer": ["x.Y", "x.Y"]}),
    "tokenizer of its own class": lambda f: settings(f, auto_map={"AutoTokenizer": ["x.Y", "x.Y"]}, tokenizer_class="Y"),
    "tokenizer, the old way": lambda f: settings(f, auto_map=["x.Y", None], tokenizer_class="Y"),
    "tokenizer by the config": lambda f: change_config(f, auto_map={"AutoTokenizer": "x.Y"}, tokenizer_class="Y"),
    "another type of model": lambda f: change_config(f, auto_map={"AutoConfig": "x.Y"}, model_type="y", architectures=["Y"]),
    "generation": lambda f: (f / "custom_generate").mkdir() or shutil.copy(f / "x.py", f / "custom_generate" / "generate.py"),
}


@pytest.mark.parametrize("change", REMOTE.values(), ids=REMOTE)
def test_no_code_of_a_checkpoint_runs_and_nobody_is_asked_to_let_it(change, checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "x.py").write_text(CODE.format(str(tmp_path / "ran")))
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    try:
        _, tokenizer = load_pretrained(folder)
        assert tokenizer.encode("1+1")
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoTokenizer", "pipeline", "Trainer", "BertJapaneseTokenizer"])
@pytest.mark.parametrize("change", [settings, change_config])
def test_a_class_that_is_no_tokenizer_of_the_tokenizers_library_is_refused(change, name, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    change(folder, tokenizer_class=name)
    with pytest.raises(UserError, match=f'tokenizer_class "{name}" is not of the tokenizers library'):
        ChatTokenizer(folder)


def other_tokenizer(folder):
    """A tokenizer of other words, in a folder beside the checkpoint's."""
    folder.mkdir()
    words = {"<|im_end|>": 0, "1": 1, "<unk>": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.1.0.0.json"))
    return folder / "tokenizer.1.0.0.json"


def test_a_tokenizer_outside_the_folder_is_not_opened(checkpoint, tmp_path):
    folder, other = shutil.copytree(checkpoint, tmp_path / "checkpoint"), other_tokenizer(tmp_path / "other")
    expected = ChatTokenizer(folder).encode("1+1?")
    for name in ("tokenizer_file", "vocab_file", "merges_file", "name_or_path", "spm_file"):
        settings(folder, **{name: str(other)})
    change_config(folder, _name_or_path=str(other), name_or_path=str(other))
    assert ChatTokenizer(folder).encode("1+1?") == expected
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "tokenizer_file": str(other)}))
    with pytest.raises(UserError, match="special_tokens_map.json: tokenizer_file is not supported"):
        ChatTokenizer(folder)


OTHERS = {"fast_tokenizer_files": ["../other/tokenizer.1.0.0.json"], "gguf_file": "../x", "vocab": "../x", "merges": "../x"}
OTHERS |= {"tokenizer_object": {}, "init_inputs": ["../x"]}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_of_another_name_is_refused(name, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    settings(folder, **{name: OTHERS[name]})
    with pytest.raises(UserError, match=f"tokenizer_config.json: {name} is not supported; the tokenizer is tokenizer.json"):
        ChatTokenizer(folder)


def test_without_a_tokenizer_json_no_other_file_is_opened_in_its_place(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: No such file"):
        ChatTokenizer(folder)


LINKS = ["added_tokens.json", "special_tokens_map.json", "tokenizer.model", "other.jinja", "vocab.txt"]
LINKS += ["additional_chat_templates", "additional_chat_templates/one.jinja"]


@pytest.mark.parametrize("name", LINKS)
def test_what_only_transformers_opens_is_no_link_out_either(name, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "out").mkdir() if name == LINKS[-2] else (tmp_path / "out").write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}: a link out of the folder, to {tmp_path / 'out'}"):
        load_pretrained(folder)


def test_a_strangers_link_to_a_gguf_file_is_not_followed(checkpoint, tmp_path):
    """As the folder of an unpacked .gguf file has one."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    (folder / NAME).symlink_to(tmp_path / "out.gguf")
    with pytest.raises(UserError, match=f"{folder}: no model.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "vocab.json", "chat_template.jinja"])
def test_a_file_that_is_read_whole_is_not_larger_than_one_may_be(name, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    with open(folder / name, "ab") as file:
        file.truncate(2**42)  # it takes no room
    with pytest.raises(UserError, match=f"{name}: larger than 1 GiB"):
        load_pretrained(folder)


WATCH = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in {watched} else None)
from full_scale.load_hf import load_pretrained
seen.clear()
_, tokenizer = load_pretrained({folder!r})
tokenizer.ask("1+1?")
print(*sorted(set(seen)), sep="\\n")
"""


def test_reading_a_folder_calls_nobody_starts_nothing_and_opens_only_its_own_files(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    settings(folder, name_or_path="evil/repo", vocab_file="/etc/hostname", merges_file="/etc/hostname")
    change_config(folder, _name_or_path="evil/repo", auto_map={"AutoModel": "evil/repo--x.Y"})
    watched = {"open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
    code = WATCH.format(watched=watched, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [eval(line) for line in done.stdout.splitlines()]
    assert {event for event, _ in events} == {"open"}
    libraries = (sys.prefix, sys.base_prefix, str(ROOT), "/usr/lib", "/proc/", "/sys/")
    opened = [path for _, path in events if not path.startswith(libraries)]
    assert opened and all(path.startswith(str(folder)) for path in opened), opened
