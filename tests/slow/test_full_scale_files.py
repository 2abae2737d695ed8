"""full_scale/'s data files: every format and shape gives the rows of its plain form, or is refused in one line."""

import bz2
import codecs
import gzip
import json
import lzma
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_docs import table
from test_full_scale import assistant, make_checkpoint, user, write

import full_scale.formats
import full_scale.rows
from full_scale.formats import json_lines
from full_scale.load_hf import ChatTokenizer
from full_scale.rollouts import read_problems
from full_scale.rows import read_rollouts
from plumbing.files import UserError, read_lines

EXAMPLES = settings(max_examples=300, deadline=None)
PROBLEMS = [{"problem": "a", "answer": "1"}, {"problem": "é “b”\u2028", "answer": "2"}]
WANTED = [("a", "1"), ("é “b”\u2028", "2")]


def lines(rows, **words):
    return "".join(json.dumps(row, ensure_ascii=False, **words) + "\n" for row in rows)


# --- formats


def parquet(rows):
    def make(path):
        datasets.Dataset.from_list(rows).to_parquet(path)

    return make


FORMATS = {
    "JSON lines": lines(PROBLEMS).encode(),
    "a byte order mark": lines(PROBLEMS).encode("utf-8-sig"),
    "a byte order mark in each part of a joined file": b"".join(lines([row]).encode("utf-8-sig") for row in PROBLEMS),
    "a byte order mark before an empty line": codecs.BOM_UTF8 + b"\r\n" + lines(PROBLEMS).replace("\n", "\r\n").encode(),
    "a JSON array": json.dumps(PROBLEMS).encode(),
    "a JSON array over lines": b"\n " + json.dumps(PROBLEMS, indent=2).encode(),
    "a JSON array with a byte order mark": json.dumps(PROBLEMS).encode("utf-8-sig"),
    "gzip": gzip.compress(lines(PROBLEMS).encode()),
    "gzip of a byte order mark": gzip.compress(lines(PROBLEMS).encode("utf-8-sig")),
    "gzip in parts": b"".join(gzip.compress(lines([row]).encode()) for row in PROBLEMS),
    "gzip of a JSON array": gzip.compress(json.dumps(PROBLEMS).encode()),
    "parquet": parquet(PROBLEMS),
}


def make(path, content):
    content(path) if callable(content) else path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_a_file_of_every_format_is_read(content, tmp_path):
    path = make(tmp_path / "it's problems", content)
    assert read_problems(path) == WANTED
    assert read_problems(path, skip_bad=True, say=pytest.fail) == WANTED


BAD_FILES = {
    "UTF-16": (lines(PROBLEMS).encode("utf-16"), "UTF-16 is not read; convert it: iconv -f UTF-16"),
    "UTF-16, the other order": (codecs.BOM_UTF16_BE + lines(PROBLEMS).encode("utf-16-be"), "UTF-16 is not read"),
    "zip": (b"PK\x03\x04 ", "a zip archive is not read; convert it: unzip "),
    "zstd": (b"\x28\xb5\x2f\xfd ", "zstd is not read; convert it: zstd -d"),
    "bzip2": (bz2.compress(lines(PROBLEMS).encode()), "bzip2 is not read; convert it: bzip2 -dc"),
    "xz": (lzma.compress(lines(PROBLEMS).encode()), "xz is not read; convert it: xz -dc"),
    "cut gzip": (FORMATS["gzip"][:-9], "not a whole gzip file: "),
    "gzip with another checksum": (FORMATS["gzip"][:-8] + bytes(8), "not a whole gzip file: "),
    "gzip of noise": (FORMATS["gzip"][:10] + b"\xff" * 9, "not a whole gzip file: "),
    "parquet of noise": (b"PAR1" + b"noise" * 9, "not a whole parquet file: "),
    "cut array": (json.dumps(PROBLEMS).encode()[:-1], "1 of 1 lines are bad: line 1: not JSON: "),
    "array of numbers": (b"[1, 2]", "2 of 2 lines are bad: line 1: not a JSON object"),
    "array without end": (b"[" * 10**5, "1 of 1 lines are bad: line 1: nested too deep"),
    "empty array": (b"[]", "empty"),
    "byte order mark alone": (codecs.BOM_UTF8 + b"\n", "empty"),
    "bad row of a table": (
        parquet([*PROBLEMS, {"problem": "c", "answer": None}]), "1 of 3 lines are bad: line 3: no answer"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line(content, message, tmp_path):
    path = make(tmp_path / "problems", content)
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def command_of(refusal):
    return str(refusal.value).partition("convert it: ")[2]


def test_the_commands_of_a_refusal_convert(tmp_path, monkeypatch):
    monkeypatch.setattr(full_scale.formats, "find_spec", lambda name: None)
    for name, content in (("table 1", FORMATS["parquet"]), ("it's wide", BAD_FILES["UTF-16"][0]), ("b", BAD_FILES["bzip2"][0])):
        path = make(tmp_path / name, content)
        with pytest.raises(UserError) as refusal:
            read_problems(path)
        command = command_of(refusal).replace("python -c", f"{shlex.quote(sys.executable)} -c")
        subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120)
        assert read_problems(path.with_name(f"{name}.jsonl")) == WANTED


NAMES = st.sampled_from(["problem", "answer", "label", "é"])
CELLS = st.text(max_size=8).filter(lambda text: text.isprintable()) | st.integers(-(2**40), 2**40)
ROWS = st.lists(
    st.dictionaries(NAMES, CELLS | st.booleans() | st.floats(-1e6, 1e6) | st.none(), min_size=1), min_size=1, max_size=6
)


@given(rows=ROWS, indent=st.sampled_from([None, 0, 3]), ascii=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig"]))
@EXAMPLES
def test_every_format_has_the_rows_of_the_lines(rows, indent, ascii, encoding, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any"
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode(encoding)
    plain = lines(rows).encode(encoding)
    for content in (plain, gzip.compress(plain), array, gzip.compress(array)):
        path.write_bytes(content)
        assert read_lines(path, dict, lines=json_lines) == rows


TABLE = st.lists(st.fixed_dictionaries({"problem": st.text(), "answer": st.integers(-(2**40), 2**40) | st.none()}), min_size=1)


@given(TABLE)
@settings(max_examples=60, deadline=None)
def test_a_table_has_the_rows_that_datasets_reads(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table"
    datasets.Dataset.from_list(rows).to_parquet(path)
    expected = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert read_lines(path, dict, lines=json_lines) == expected


def test_a_table_writes_no_null_that_no_row_has(tmp_path):
    calls = [{"name": "add", "arguments": {"x": 1}}, {"name": "say", "arguments": {"text": "a", "more": [{"b": 1}]}}]
    datasets.Dataset.from_list([{"calls": [call]} for call in calls]).to_parquet(tmp_path / "table")
    assert read_lines(tmp_path / "table", dict, lines=json_lines) == [{"calls": [call]} for call in calls]


# --- shapes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return ChatTokenizer(folder)


def in_shapes(turns, good, bad):
    """One pair in every shape of messages: {name: its lines}."""
    good, bad = assistant(good), assistant(bad)
    text = turns[-1]["content"]
    return {
        "unpaired": [{"prompt": turns, "completion": [m], "label": m is good} for m in (good, bad)],
        "unpaired, labels 0 and 1": [{"prompt": turns, "completion": [m], "label": int(m is good)} for m in (good, bad)],
        "unpaired, labels 0.0 and 1.0": [{"prompt": turns, "completion": [m], "label": float(m is good)} for m in (good, bad)],
        "unpaired, answers as texts": [{"prompt": turns, "completion": m["content"], "label": m is good} for m in (good, bad)],
        "whole conversations in completion": [{"completion": [*turns, m], "label": m is good} for m in (good, bad)],
        "messages": [{"messages": [*turns, m], "label": m is good} for m in (good, bad)],
        "paired": [{"prompt": turns, "chosen": [good], "rejected": [bad]}],
        "paired, answers as texts": [{"prompt": turns, "chosen": good["content"], "rejected": bad["content"]}],
        "paired, one answer as text": [{"prompt": turns, "chosen": [good], "rejected": bad["content"]}],
        "paired, implicit prompt": [{"chosen": [*turns, good], "rejected": [*turns, bad]}],
        "paired, whole conversations": [{"prompt": turns, "chosen": [*turns, good], "rejected": [*turns, bad]}],
        "paired, the prompt as text": [{"prompt": text, "chosen": [*turns, good], "rejected": [*turns, bad]}],
        "with empty columns": [{"prompt": turns, "completion": [{**m, "tool_calls": None}], "label": m is good, "chosen": None,
                                "rejected": None, "tools": None, "chat_template_kwargs": {}} for m in (good, bad)],
    }  # fmt: skip


def rows_of(path, tokenizer, some):
    names = ("prompt", "completion", "label", "finished", "problem_id")
    return [tuple(row[name] for name in names) for row in read_rollouts(write(path, *some), tokenizer)]


SAID = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.sampled_from(" \n"), min_size=1).map(str.strip)
SAID = SAID.filter(bool)


@given(asked=SAID, system=st.none() | SAID, earlier=st.lists(SAID, max_size=1), good=SAID, bad=SAID)
@EXAMPLES
def test_every_shape_gives_the_rows_of_its_texts(asked, system, earlier, good, bad, tokenizer, tmp_path_factory):
    turns = [{"role": "system", "content": system}] if system else []
    turns += [turn for text in earlier for turn in (user(text), assistant(text))]
    turns.append(user(asked))
    path, prompt = tmp_path_factory.getbasetemp() / "shapes", tokenizer.render(turns)
    for name, some in in_shapes(turns, good, bad).items():
        expected = [(prompt, good, True, True, 0), (prompt, bad, False, True, 0)]
        assert rows_of(path, tokenizer, some) == expected, name


@given(asked=SAID, good=SAID, bad=SAID)
@EXAMPLES
def test_a_pair_of_texts_without_a_prompt_is_split_as_trl_does(asked, good, bad, tokenizer, tmp_path_factory):
    def trl(chosen, rejected):  # trl.extract_prompt
        for i in range(min(len(chosen), len(rejected))):
            if chosen[i] != rejected[i]:
                if chosen[i - 1] == " ":
                    i -= 1
                break
        return chosen[:i], chosen[i:], rejected[i:]

    chosen, rejected = f"{asked}? {good}.", f"{asked}? {bad}!"
    prompt, *answers = trl(chosen, rejected)
    rows = rows_of(tmp_path_factory.getbasetemp() / "pair", tokenizer, [{"chosen": chosen, "rejected": rejected}])
    assert [row[:3] for row in rows] == [(prompt, answer, answer is answers[0]) for answer in answers]


def test_a_table_of_messages_gives_the_rows_of_its_lines(tokenizer, tmp_path):
    """In a table every message has every field, null where another's row has it."""
    turns = [user("1+1?")]
    some = [{"prompt": turns, "completion": [assistant("2")], "label": 1.0},
            {"prompt": turns, "completion": [assistant("3", name=None)], "label": 0.0}]  # fmt: skip
    datasets.Dataset.from_list(some).to_parquet(tmp_path / "table")
    rows = [(row["completion"], row["label"]) for row in read_rollouts(tmp_path / "table", tokenizer)]
    assert rows == [("2", True), ("3", False)]


ASKED, NO, TOOLS = [user("Hi?")], [assistant("no")], [{"type": "function"}]
BAD_SHAPES = {
    "an answer by the user": ({"prompt": ASKED, "chosen": [user("yes")], "rejected": NO},
                              'chosen ends with a message of "user"'),
    "an answer by a tool": ({"prompt": ASKED, "completion": [{"role": "tool", "content": "1"}], "label": True},
                            'completion ends with a message of "tool"'),
    "messages that end with the user": ({"messages": ASKED, "label": True}, 'messages ends with a message of "user"'),
    "an answer alone": ({"messages": NO, "label": True}, "no prompt"),
    "answers alone": ({"chosen": [assistant("yes")], "rejected": NO}, "no prompt"),
    "tool calls": (
        {"prompt": ASKED, "chosen": [assistant("yes", tool_calls=[{"function": {"name": "calc"}}])], "rejected": NO},
        "the chat template leaves out tool_calls of the message "),
    "tool calls alone": (
        {"prompt": ASKED, "completion": [{"role": "assistant", "tool_calls": [{"function": {"name": "calc"}}]}], "label": 1},
        "the chat template"),
    "reasoning": ({"prompt": ASKED, "chosen": [assistant("yes", reasoning_content="because")], "rejected": NO},
                  "the chat template leaves out reasoning_content of the message "),
    "reasoning before": ({"messages": [*ASKED, assistant("yes", reasoning="because"), *ASKED, *NO], "label": 0},
                         "the chat template leaves out reasoning of the message "),
    "a name": ({"prompt": [{**ASKED[0], "name": "Ann"}], "completion": NO, "label": 0},
               "the chat template leaves out name of the message "),
    "tools": ({"prompt": ASKED, "completion": NO, "label": 0, "tools": TOOLS}, "the chat template leaves out tools"),
    "tools as text": ({"prompt": ASKED, "completion": NO, "label": 0, "tools": json.dumps(TOOLS)}, "the chat template leaves"),
    "tools beside a text": ({"prompt": "Hi?", "completion": "no", "label": 0, "tools": TOOLS},
                            "tools beside a prompt that is a text"),
    "reasoning after a text": ({"prompt": "Hi?", "completion": [assistant("no", reasoning="because")], "label": 0},
                               "after a prompt that is a text no chat template writes reasoning"),
    "words of no object": ({"prompt": ASKED, "completion": NO, "label": 0, "chat_template_kwargs": [1]},
                           "chat_template_kwargs is [1], not an object"),
    "words that are ours": ({"prompt": ASKED, "completion": NO, "label": 0, "chat_template_kwargs": {"tokenize": True}},
                            "the chat template refuses these messages"),
    **{f"a word named {name}": ({"prompt": ASKED, "completion": NO, "label": 0, "chat_template_kwargs": {name: "x"}},
                                "the chat template refuses these messages") for name in ("messages", "conversation", "self")},
    "two conversations": ({"chosen": [user("a"), *NO], "rejected": [user("b"), *NO]},
                          "chosen and rejected are of different prompts"),
    "another prompt": ({"prompt": ASKED, "chosen": [user("b"), *NO], "rejected": NO}, "chosen is ["),
    "another prompt as text": ({"prompt": "b", "completion": [*ASKED, *NO], "label": 1}, "completion is ["),
    "turns of the user in an answer": ({"prompt": ASKED, "completion": [*NO, *ASKED, *NO], "label": 1}, "completion is ["),
    "label -1": ({"prompt": "a", "completion": "b", "label": -1}, "label is -1, not true or false"),
    "label as text": ({"prompt": "a", "completion": "b", "label": "1"}, 'label is "1", not true or false'),
    "label null": ({"prompt": "a", "completion": "b", "label": None}, "no label"),
    "steps": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "no completion"),
    "equal texts": ({"chosen": "a", "rejected": "a"}, "chosen is empty"),
    "content in parts": ({"prompt": [user([{"type": "text", "text": "a"}])], "completion": "b", "label": 1}, "prompt is ["),
    "no messages": ({"messages": [], "label": 1}, "messages is [], neither"),
    "tools that are not JSON": ({"prompt": ASKED, "completion": NO, "label": 0, "tools": "calc"}, "Expecting value"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_a_shape_that_would_lose_something_is_refused(line, message, tokenizer, tmp_path):
    path = write(tmp_path / "rollouts", {"prompt": "a", "completion": "b", "label": True}, line)
    with pytest.raises(UserError) as caught:
        read_rollouts(path, tokenizer)
    assert str(caught.value).startswith(f"{path}: 1 of 2 lines are bad: line 2: {message}") and "\n" not in str(caught.value)


# --- the docs

DOCS_FILES = {
    "JSON lines in UTF-8": ["JSON lines", "a byte order mark", "a byte order mark in each part of a joined file"],
    "a JSON array": ["a JSON array", "a JSON array over lines", "a JSON array with a byte order mark"],
    "gzip of either": ["gzip", "gzip of a JSON array"],
    "parquet": ["parquet"],
    "UTF-16, zip, zstd, bzip2, xz": ["UTF-16", "zip", "zstd", "bzip2", "xz"],
}
DOCS_SHAPES = {
    "`prompt`, `completion`, `label`": [{"prompt": ASKED, "completion": NO, "label": 0}],
    "`messages`, `label`": [{"messages": [*ASKED, *NO], "label": 0}],
    "`completion`, `label`": [{"completion": [*ASKED, *NO], "label": 0}],
    "`prompt`, `chosen`, `rejected`": [{"prompt": ASKED, "chosen": NO, "rejected": NO}],
    "`chosen`, `rejected`": [{"chosen": [*ASKED, *NO], "rejected": [*ASKED, *NO]}, {"chosen": "a b", "rejected": "a c"}],
}


def test_the_docs_say_which_files_are_read():
    rows = dict(table(Path("docs/full_scale.md"), "file"))
    assert rows.keys() == DOCS_FILES.keys()
    for name, keys in DOCS_FILES.items():
        for key in keys:
            content, message = BAD_FILES[key] if rows[name].startswith("refused") else (FORMATS[key], None)
            assert content and (message is None) == rows[name].startswith("read")
            assert message is None or "convert it: " in message or "is not read" in message


def test_the_docs_say_which_shapes_are_read(tokenizer, tmp_path):
    rows = dict(table(Path("docs/full_scale.md"), "fields"))
    assert rows.keys() == DOCS_SHAPES.keys()
    for name, examples in DOCS_SHAPES.items():
        assert all(name == ", ".join(f"`{field}`" for field in example) for example in examples)
        assert all(name.replace("`", "") in full_scale.rows.__doc__ for _ in examples)
        for example in examples:
            found = read_rollouts(write(tmp_path / "rows", example), tokenizer)
            assert len(found) == ("one", "two").index(rows[name].split(";")[0]) + 1
            if "a b" not in example.values():
                assert {(row["prompt"], row["completion"]) for row in found} == {(tokenizer.render(ASKED), "no")}
