"""Rollouts from others' files: TRL's shapes as rows of a prompt, a completion and a label, and a row as tokens.

A shape is one of these; prompts and completions are texts or lists of messages, labels true, false, 1 or 0:
    prompt, completion, label               TRL's unpaired preferences
    messages, label                         the same, the answer being the last message
    completion, label                       the same, the conversation in completion holding its prompt
    prompt, chosen, rejected                its paired preferences, which become two rows
    chosen, rejected                        the same with the prompt inside: what both texts or conversations begin with
An answer of several messages is a whole conversation, which the prompt begins. `tools` and `chat_template_kwargs` go to the
chat template. Left out: `completions` with a label a step, and messages whose content is not a text.
"""

import json
import os

from plumbing.files import field, read_lines, shown

from .formats import json_lines


def is_conversation(value):
    """Whether a value is a list of messages: each has a role, and a text for content or other fields in its place."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
        and all(isinstance(message.get("content", ""), str) and len(message) > 1 for message in value)
    )


def plain(value):
    """A value without the fields of its messages that are null, as a table has them where other rows have such a field."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [{name: part for name, part in message.items() if part is not None} for message in value]
    return value


def checked(line, name):
    """A text or a list of messages. Raises ValueError."""
    if name not in line:
        raise ValueError(f"no {name}")
    value = plain(line[name])
    if not isinstance(value, str) and not is_conversation(value):
        raise ValueError(f"{name} is {shown(value)}, neither a text nor a list of messages")
    return value


def truth(line):
    """A label. Raises ValueError."""
    if "label" in line and line["label"] in (0, 1):  # a table may have 1.0
        return bool(line["label"])
    return field(line, "label", bool)


def split_pair(line):
    """The texts of a pair without a prompt -> (prompt, chosen, rejected), as TRL splits them: where they begin to differ."""
    texts = line["chosen"], line["rejected"]
    begin = len(os.path.commonprefix(texts))
    begin -= texts[0][:begin].endswith(" ")  # a space belongs to the word after it
    return texts[0][:begin], *(text[begin:] for text in texts)


def split_conversation(name, value, prompt):
    """A whole conversation -> (its messages before the answer, the answer's message).

    prompt: what the line has for one, a text or messages, or None. Raises ValueError where the conversation has another.
    """
    before, answer = value[:-1], value[-1]
    said = [message.get("content", "").strip() for message in before if message["role"] == "user"]
    if prompt not in (None, before) and not (isinstance(prompt, str) and prompt.strip() in said):
        raise ValueError(f"{name} is {shown(value)}, a conversation that the prompt does not begin")
    return before, answer


def shape(line):
    """A line of any shape -> (prompt, {name: answer}, {name: label}); an answer is a text or a message. Raises ValueError."""
    pair, conversation = "chosen" in line, "messages" in line and "completion" not in line
    names = ["chosen", "rejected"] if pair else ["messages" if conversation else "completion"]
    answers = {name: checked(line, name) for name in names}
    labels = {name: name == "chosen" if pair else truth(line) for name in names}
    prompt = checked(line, "prompt") if "prompt" in line else None
    prompts = []
    if prompt is None and pair and all(isinstance(value, str) for value in answers.values()):
        prompt, *texts = split_pair(line)
        answers = dict(zip(names, texts))
    for name, value in answers.items():
        prompts.append(prompt)
        if not isinstance(value, str):
            if len(value) > 1:
                prompts[-1], answers[name] = split_conversation(name, value, prompt)
            else:
                answers[name] = value[0]
            if answers[name]["role"] != "assistant":
                raise ValueError(f"{name} ends with a message of {shown(answers[name]['role'])}, not of the assistant")
        if prompts[-1] is None:
            raise ValueError("no prompt")
    if any(asked != prompts[0] for asked in prompts):
        raise ValueError("chosen and rejected are of different prompts")
    return prompts[0], answers, labels


def template_words(line):
    """What a line has for the chat template beside messages. Raises ValueError."""
    words, tools = line.get("chat_template_kwargs", {}), line.get("tools")
    if not isinstance(words, dict):
        raise ValueError(f"chat_template_kwargs is {shown(words)}, not an object")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    return {**words, "tools": tools} if tools else words


def texts_of(prompt, answer, tokenizer, words):
    """A prompt and an answer, (texts or messages), as texts. Raises ValueError, UserError."""
    if isinstance(answer, str):
        return prompt if isinstance(prompt, str) else tokenizer.render(prompt, **words), answer
    if not isinstance(prompt, str):
        return tokenizer.render_answer(prompt, answer, **words)
    others = [name for name in answer if name not in ("role", "content")]
    if others or "content" not in answer:
        raise ValueError(f"after a prompt that is a text no chat template writes {', '.join(others)} of {shown(answer)}")
    return prompt, answer["content"]


def rollouts_of(line, tokenizer):
    """A line's object -> its rows {"prompt", "completion", "label", "finished"}, a pair's two. Raises ValueError, UserError.

    Beside these: `chat`, whether the prompt is the chat template's, and what the line has of prompt_ids, completion_ids and
    stop_reason, the tokens that were sampled and the text that ended them.
    """
    line = {name: value for name, value in line.items() if value is not None}  # a table has every column in every row
    (prompt, answers, labels), words = shape(line), template_words(line)
    if isinstance(prompt, str) and words:
        raise ValueError(f"{', '.join(words)} beside a prompt that is a text: no chat template writes it")
    finished = field(line, "finished", bool) if "finished" in line else True
    ends = line.get("finished") is True and not isinstance(line.get("stop_reason"), str)  # by a token, which is trained
    sampled = {name: line[name] for name in ("prompt_ids", "completion_ids", "stop_reason") if name in line}
    rows = []
    for name, answer in answers.items():
        asked, completion = texts_of(prompt, answer, tokenizer, words)
        if not completion and not ends and not sampled.get("completion_ids"):
            raise ValueError(f"{name} is empty")
        row = {"prompt": asked, "completion": completion, "label": labels[name], "finished": finished}
        rows.append({**row, "chat": not isinstance(prompt, str), **sampled})
    return rows


# --- tokens


def tokens_of(row, tokenizer, encode):
    """A row's prompt and completion as token ids: those that were sampled where the row has them, else its texts in place.

    encode: tokenizer's own, or one that remembers. Raises ValueError, UserError.
    """
    prompt = encode(row["prompt"], special=not row["chat"])
    if "prompt_ids" in row:  # of a chat template's text, which has its own BOS or wants none
        prompt = prompt if row["prompt_ids"] == prompt else encode(row["prompt"], special=False)
        if row["prompt_ids"] != prompt:
            raise ValueError("prompt_ids are not the prompt's tokens; without them the text is tokenised")
    if not prompt:
        raise ValueError("a prompt of no token, so that none predicts the first answer token")
    if "completion_ids" in row:
        ids = sampled_ids(row, prompt, tokenizer)
    else:
        ids = tokenizer.encode_after(row["prompt"], prompt, row["completion"])
    if not (ids := ended(ids, row, tokenizer)):
        raise ValueError("a completion of no token")
    return prompt, ids


def sampled_ids(row, prompt, tokenizer):
    """completion_ids. Raises ValueError where they do not spell the completion."""
    ids, stop = row["completion_ids"], row.get("stop_reason")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids):
        raise ValueError(f"completion_ids is {shown(ids)}, not token ids below {tokenizer.vocab_size:,}")
    text = tokenizer.decode_after(prompt, ids[:-1] if ids and ids[-1] in tokenizer.stops else ids)
    if text != row["completion"] and not (isinstance(stop, str) and text.startswith(row["completion"] + stop)):
        raise ValueError(f"completion_ids spell {shown(text)}, not the completion; without them the text is tokenised")
    return ids


def ended(ids, row, tokenizer):
    """A completion's ids with one end: what comes after the first, where it says nothing, is left out. Raises ValueError."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.stops), None)
    if end is None:
        return [*ids, tokenizer.eos] if row["finished"] and not isinstance(row.get("stop_reason"), str) else ids
    rest = tokenizer.decode([token for token in ids[end + 1 :] if token not in tokenizer.stops], special=True)
    if rest.strip():
        raise ValueError(f"the completion goes on after its end {tokenizer.decode([ids[end]], special=True)}: {shown(rest)}")
    return ids[: end + 1]


# --- files


def read_rollouts(path, tokenizer, more=lambda row: {}, **words):
    """A file of rollouts in any shape -> the rows of `rollouts_of`, each with problem_id.

    Rows of the same prompt are of the same problem. `more` gives a row more fields, or refuses it by ValueError or UserError;
    `words` are those of files.read_lines. Raises UserError that names the file and its bad lines.
    """

    def parse(line):
        return [{**row, **more(row)} for row in rollouts_of(line, tokenizer)]

    ids = {}
    lines = read_lines(path, parse, lines=json_lines, **words)
    return [{**row, "problem_id": ids.setdefault(row["prompt"], len(ids))} for rows in lines for row in rows]
