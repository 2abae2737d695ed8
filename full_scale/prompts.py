"""A checkpoint's tokenizer and chat template, as transformers reads and renders them, the template in jinja's sandbox.

What a template leaves out of a message is refused: training would see another question or answer than the file has.
"""

import contextlib
import datetime
import functools
import os
from types import SimpleNamespace
from unittest import mock

from transformers.utils import chat_template_utils

from plumbing.files import UserError, one_line, read_json, shown

from .published import read_tokenizer

PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


class ChatTokenizer:
    """A checkpoint's tokenizer with its chat template. Raises UserError where a file is missing or broken.

    tokenizer: transformers' own. vocab_size: how many tokens the weights know; positions: how many the model was made for, or
    None; eos: the one that ends an answer and is trained as such, the template's where it writes one; stops: all that end one,
    a set. `template_args` go to the template, and `date` is its today.
    """

    def __init__(self, folder):
        self.tokenizer = read_tokenizer(folder)
        path = folder / "generation_config.json"
        raw, generation = read_json(folder / "config.json"), read_json(path) if path.exists() else {}
        self.vocab_size, ids = raw.get("vocab_size"), generation.get("eos_token_id", raw.get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = self.tokenizer.eos_token_id
        if type(self.vocab_size) is not int:
            raise UserError(f"{folder / 'config.json'}: vocab_size is {shown(self.vocab_size)}, not a whole number")
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
            raise UserError(f"{folder}: eos_token_id is {shown(ids)}, not one or several token ids")
        if own is not None and own >= self.vocab_size:
            raise UserError(f"{folder}: the tokenizer's eos_token is token {own}, and the vocabulary is of {self.vocab_size:,}")
        self.stops = {*ids, *([] if own is None else [own])}
        if not self.stops:
            raise UserError(f"{folder}: no eos_token_id in generation_config.json or config.json, no eos_token")
        self.positions = raw.get("max_position_embeddings")
        self.own_eos = ids[0] if own is None else own
        self.use_template({}, datetime.datetime.now())

    def use_template(self, args, date, plain=False):
        """Give the chat template what it may read beside messages, and its today; `plain`: problems are asked without it."""
        self.template_args, self.date = args, date
        self.plain = plain or not self.tokenizer.chat_template
        self.stops.add(self.turn_end())
        self.eos = self.own_eos if plain else self.turn_end()

    # --- tokens

    @functools.cached_property
    def begin(self):
        """The ids that the tokenizer puts before a text, such as its BOS. What it puts after one would end a prompt."""
        bare, whole = (self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
        places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: places[0]] if bare and places else []

    def encode(self, text, special=True):
        """Token ids; after those that the tokenizer puts before a text, unless `special` is off or the text has its BOS.

        Raises UserError where the checkpoint has no such token, and where a prompt, `special`, has none.
        """
        bos = self.tokenizer.bos_token
        begun = bool(bos) and text.startswith(bos)
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            ids = [*self.begin, *ids] if special and not begun else ids
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer refuses {shown(text)}: {error}") from None
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"the tokenizer makes token {max(ids)} of {shown(text)}, and the vocabulary is of {self.vocab_size:,}"
            )
        if special and not ids:
            raise UserError("a prompt of no token, so that none predicts the first answer token")
        return ids

    def decode(self, ids, special=False):
        """Their text, without the special tokens unless `special`."""
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def decode_after(self, prompt, ids):
        """The text of tokens in their place after a prompt's, special tokens included; alone they may spell another."""
        before, whole = self.decode(prompt, special=True), self.decode([*prompt, *ids], special=True)
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(ids, special=True)

    def encode_after(self, prompt, ids, text):
        """Token ids of a text in its place after a prompt, whose ids are known.

        Where both are encoded together and the prompt keeps its ids, the rest. Otherwise a token lies across the border, which
        no policy samples; then the text behind another start, or alone, whichever spells it after the prompt.
        """
        special = ids[: len(self.begin)] == self.begin
        whole, choices = self.encode(prompt + text, special), []
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        for start in "\n.a0":
            before, behind = self.encode(start, special=False), self.encode(start + text, special=False)
            choices += [behind[len(before) :]] if behind[: len(before)] == before else []
        choices.append(self.encode(text, special=False))
        return next((some for some in choices if self.decode_after(ids, some) == text), choices[0])

    def turn_end(self):
        """The token that the chat template puts after an answer, or the tokenizer's end where it puts none."""
        with contextlib.suppress(Exception):  # a template can fail in any way
            messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "answer"}]
            rest = self.encode(self.written(messages, add_generation_prompt=False).rpartition("answer")[2], special=False)
            added = set(self.tokenizer.get_added_vocab().values())
            first = next(i for i, token in enumerate(rest) if token in added)
            if not self.decode(rest[:first]).strip():
                return rest[first]
        return self.own_eos

    # --- the chat template

    def written(self, messages, /, **words):
        """What the chat template makes of messages. Raises UserError."""
        templates, words = self.tokenizer.chat_template, {**self.template_args, **words}
        if not templates:
            raise UserError("this checkpoint has no chat template, so a prompt must be a text, not a list of messages")
        if isinstance(templates, dict) and "default" not in templates and words.get("chat_template") not in templates:
            names = ", ".join(sorted(templates))
            how = "--template-arg chat_template=NAME, or a line's chat_template_kwargs"
            raise UserError(f"the chat template is one of {names}: choose by {how}")
        try:
            # transformers gives a template the machine's date, and has no word for another
            with mock.patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: self.date)):
                return self.tokenizer.apply_chat_template(messages, tokenize=False, **words)
        except Exception as error:  # a template can fail in any way
            raise UserError(f"the chat template refuses these messages: {one_line(error, '')}") from None

    def tells(self, text, messages, /, **words):
        """Whether these messages are written otherwise than as `text`, or not at all, because the template needs the rest."""
        try:
            return self.written(messages, **words) != text
        except UserError:
            return True

    def heard(self, messages, /, **words):
        """What is `written`. Raises UserError where a field of a message, or the tools, make no difference to it."""
        text = self.written(messages, **words)
        for number, message in enumerate(messages):
            for name in (name for name, value in message.items() if name != "role" and str(value or "").strip()):
                others = [{key: value for key, value in message.items() if key != name}]
                if isinstance(message[name], str):  # what it says may be what the template says without it
                    others.append({**message, name: f"{message[name]}."})
                if not any(self.tells(text, [*messages[:number], other, *messages[number + 1 :]], **words) for other in others):
                    raise UserError(f"the chat template leaves out {name} of the message {shown(message)}")
        if words.get("tools") and not self.tells(text, messages, **{**words, "tools": None}):
            raise UserError("the chat template leaves out tools")
        return text

    def render(self, messages, /, **words):
        """A list of messages as a prompt, up to where the answer begins, or goes on where the last message is the assistant's.

        `words` go to the template: tools, and whatever else it reads. Raises UserError, also where it leaves something out.
        """
        goes_on = messages[-1]["role"] == "assistant"
        words |= {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        return self.heard(messages, **words)

    def render_answer(self, messages, answer, /, **words):
        """(prompt, completion) of an answer's message as the template writes it, without its end of the turn.

        The prompt is that of `render`, but for what the template itself takes back before an answer. Raises UserError.
        """
        prompt, content = self.render(messages, **words), answer.get("content", "").strip()
        if messages[-1]["role"] == "assistant":  # whose message the answer goes on with
            answer = {**messages[-1], **answer, "content": messages[-1]["content"] + answer.get("content", "")}
            messages = messages[:-1]
        messages = [*messages, answer]
        whole = self.heard(messages, **words)
        begin, place = len(os.path.commonprefix([prompt, whole])), whole.rfind(content)
        begin = begin if place < 0 else min(begin, place)
        prompt, completion = whole[:begin], whole[begin:]
        if "".join(content.split()) not in "".join(completion.split()):
            raise UserError(f"the chat template does not write all of the answer {shown(content)}; try it as a text")
        end = self.decode([self.eos], special=True)
        return prompt, completion.rstrip().removesuffix(end) if completion.rstrip().endswith(end) else completion

    def ask(self, problem, system=PROMPT, shots=()):
        """A problem as a prompt: through the chat template where there is one, else as plain text.

        system: the instruction, or "" for none, in the user's message where the template refuses or leaves out the system's.
        shots: (problem, solution) pairs that come before, as earlier turns, or in plain text as the few-shot protocols do.
        """
        if self.plain:
            if not shots:
                return f"{problem}\n{system}\n" if system else f"{problem}\n"
            blocks = [f"Problem:\n{asked}\n\nSolution: {solution}\n\n" for asked, solution in shots]
            return "".join([*([f"{system}\n\n"] if system else []), *blocks, f"Problem:\n{problem}\n\nSolution:"])
        turns = [{"role": role, "content": text} for shot in shots for role, text in zip(("user", "assistant"), shot)]
        if system:
            with contextlib.suppress(UserError):
                return self.render([{"role": "system", "content": system}, *turns, {"role": "user", "content": problem}])
            problem = f"{problem}\n{system}"
        return self.render([*turns, {"role": "user", "content": problem}])
