r"""Whether an answer is right: where a text states its answer, and whether that equals the gold one.

The answer is in the last \boxed{} or \fbox{} that holds something, or behind a later "The answer is", "Answer:" or "####".
Numbers are compared here, exactly and in any usual spelling. Anything else is left to math-verify, which reads 4.5e33 as a
product and rounds to six decimals. Left out: number words, and small numbers inside of lists.
"""

import functools
import logging
import math
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from math_verify import parse, verify
from math_verify.parser import NormalizationConfig, normalize_latex
from sympy import Basic, MatrixBase

LONGEST = 500  # characters of an answer that is read
LARGEST = 1000  # power of ten of a number that is read
logging.getLogger("math_verify").setLevel(logging.ERROR)  # which else prints every answer that takes it five seconds


# --- where the answer stands

TEX = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:(?P<box>\{)|(?P<bare>\\[a-zA-Z]+(?:\{[^{}]*\})+|[-+]?[\d.][^\s{}$\\]*))"
    r"|\\(?!\\?(?:boxed|fbox))[^a-zA-Z]"  # an escaped brace is no brace
    r"|(?P<brace>[{}])"
)
HOLLOW = re.compile(
    r"\\(?:boxed|fbox|text|mbox|mathrm|[lcd]?dots|q?quad|square|Box)\b|\b(?:the |your |final )*answer(?: here)?\b",
    re.IGNORECASE,
)
CONTENT = re.compile(r"[^\W_]|\\[a-zA-Z]|[∞∅]")
MARK = re.compile(
    r"####(?!#)(?![^\S\n]*\d+[.)][^\S\n]+\S)"  # no numbered heading
    r"|\bans(?:wer)?\s*(?:\([^()\n]{0,40}\))?\s*[*_]*\s*[:=：]"
    r"|\banswers?(?:\s+(?:to|of|for)\s[^.\n]{0,100}?)?\s+(?:is|are|(?:would|should|must|will)\s+be|equals)\b"
    r"(?:\s+(?:therefore|thus|hence|then|now|just|indeed|about|equal\s+to|\w{1,20}ly\b))*"
    r"|^[ \t#*_]*(?:the\s+)?(?:final\s+)?answer[ \t*_:]*$|<answer>",
    re.IGNORECASE | re.MULTILINE,
)
VALUE = re.compile(  # how no sentence begins
    r"[-+−]?\s*\\?[$€£¥₹]?\s*[\d.\\(\[{]|\$|[A-Za-z](?:\W*$|\s*[-+*/^_(])|[A-Za-z]+[+*/^_(\d]|[^\s=]+\s*[=<>]"
)
SEGMENT = r"(?:\$\$[^$]+\$\$|\$[^$\n]*[^$\s]\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\])"
MATH = re.compile(rf"{SEGMENT}(?:\s*(?:,?\s*and|,?\s*or|,)\s*{SEGMENT})*", re.DOTALL)
SENTENCE = re.compile(r"[.?](?=\s|$)|\n|\bI hope\b|<[|/]")  # ends here; a special token ends it too


def final_answer(completion, finished=False, strict=False):
    """The text of the answer that a completion states, or None where it states none.

    Without a box or a marker, a finished completion's answer is what its last sentence ends in. `strict`: a box only.
    """
    end, boxed = last_box(completion)
    marked, words = (None, None) if strict else last_marked(completion, end)
    if boxed and not marked:
        return last_marked(boxed, 0)[0] or boxed  # \boxed{\text{The answer is } 8}
    return marked or (ending(completion) if finished and not strict else None) or words


def last_box(text):
    """Of the box that begins last among those with content: (where it ends, what it holds), or (0, None). One pass."""
    opened, last, found = [], -1, (0, None)
    for token in TEX.finditer(text):
        if token["box"] or token["brace"] == "{":
            opened.append((token.start() if token["box"] else -1, token.end()))
        elif token["bare"] or (token["brace"] and opened):
            start, begin = (token.start(), token.start("bare")) if token["bare"] else opened.pop()
            held = text[begin : token.end() if token["bare"] else token.start()] if start > last else ""
            if len(held) > LONGEST or holds_something(held):
                last, found = start, (token.end(), held.strip())
    return found


def holds_something(text):
    return CONTENT.search(HOLLOW.sub("", text)) is not None


def last_marked(text, begin):
    """What the markers behind a position say: (the last number or mathematics, else the last words), one or both None."""
    end, words = len(text), None
    for mark in reversed(list(MARK.finditer(text, begin))):
        value = stated(text[mark.end() : min(end, mark.end() + LONGEST)])
        if holds_something(value):
            if VALUE.match(value) or number(value):
                return value, None
            words = words or (wording(value) and value)
        end = mark.start()
    return None, words


def stated(text):
    """What a text begins with: mathematics, a number before words, or a sentence."""
    text = text.lstrip(" \t\n\r*_:>`}")
    if formula := MATH.match(text):
        return formula[0]
    sentence = SENTENCE.split(text, maxsplit=1)[0].strip(" \t\r*_`!")
    counted = re.match(
        rf"({NUMBER})(?=\s+(?!{NO_UNIT})[a-z]{{2}}|\s*[,;:(]\s*(?!{NO_UNIT})[a-z(])", plain(sentence), re.IGNORECASE
    )
    return counted[1] if counted else sentence


def ending(text):
    """What a text's last sentence ends in, mathematics or a number with up to three words behind it, or None."""
    text = re.sub(r"(?:\s|[*_`]|<\|[^<>]*\|>|</s>)+$", "", text[-LONGEST:])
    if formula := re.search(rf"({MATH.pattern})\s*\.?$", text, re.DOTALL):
        return formula[1]
    sentence = re.split(r"\n|[.!?]\s+", text.rstrip(".!"))[-1]
    if "?" in sentence or re.search(r"\bor\b", sentence):
        return None
    counted = re.search(rf"(?:^|[\s=:(])({NUMBER})(?:\s+[A-Za-z]+){{0,3}}$", plain(sentence[-200:]))
    return counted and counted[1]


# --- numbers

SPELLINGS = {"-": "−–‒‐‑﹣", "/": "∕⁄÷", "*": "×·⋅∙∗", " ": "\u00a0\u2007\u2009\u202f", "'": "’", "°": "º"}
SAME = {ord(other): usual for usual, others in SPELLINGS.items() for other in others}
SAME |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
PLAIN = [
    (r"\\?[$€£¥₹]|\\(?:left|right|displaystyle|!)|\\[()\[\]]", ""),
    (r"\\(?:[,;: ]|thinspace|q?quad)|~", " "),
    (r"^[\s*_`]+|[\s*_`.,;:\\]+$", ""),
    (r"\{\s*([,.']?)\s*\}", r"\1"),
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|bold(?:symbol)?|underline|num)\s*\{([^{}]*)\}", r"\1"),
    (r"(?:\^\s*\{\s*\\circ\s*\}|\^?\s*(?:\\circ|\\degree|°))(?:\s*[CF]\b)?", ""),
    (r"\s*\b(?:dollars?|euros?|USD)\s*$", ""),
    (r"\\times|\\cdot|\\ast", "*"),
    (r"\*\*", "^"),
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: f"^({match[0].translate(RAISED)})"),
    (r"\^\s*\{\s*([+-]?\s*\d+)\s*\}", r"^(\1)"),
    (r"\{\s*10\s*\}(?=\s*\^)", "10"),
    (r"[¼-¾⅐-⅞]", lambda match: " ({})/({})".format(*unicodedata.normalize("NFKC", match[0]).split("⁄"))),
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"(\1)/(\2)"),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"(\1\2)/(\3\4)"),
    (r"\\%|(?<=[\d.])\s*(?:percent(?:age)?|per cent|pct)\b", "%"),
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"^\s*\(((?:[^(),]|\([^(),]*\))*)\)\s*$", r"\1"),
]
PLAIN = [(re.compile(pattern, re.ASCII), spelling) for pattern, spelling in PLAIN]

WHOLE = r"(?:[0-9]{1,3}(?:[,' _][0-9]{3})+(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{WHOLE}?\.[0-9]*\\overline\{{[0-9]+\}}|{WHOLE}(?:\.[0-9]*)?|\.[0-9]+)"
POWER = r"10\s*\^\s*\(?\s*[+-]?\s*[0-9]+\s*\)?"
REAL = rf"(?:{POWER}|{DECIMAL}(?:\s*[*xX]\s*{POWER}|\s*[eE]\s*[({{]?[+-]?[0-9]+[)}}]?)?)"
RATIO = rf"(?:\(\s*[+-]?\s*{REAL}\s*\)|{REAL})\s*/\s*(?:\(\s*[+-]?\s*{REAL}\s*\)|{DECIMAL})"
MIXED = rf"(?:{WHOLE}\s*\(\s*{WHOLE}\s*\)\s*/\s*\(\s*{WHOLE}\s*\)|{WHOLE}\s+{WHOLE}\s*/\s*{WHOLE})"
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SIZE = rf"(?:{MIXED}|{RATIO}|{REAL})"
NUMBER = rf"[+-]?\s*(?:{SIZE}|\(\s*{SIZE}\s*\))\s*%?(?:\s*(?:{'|'.join(SCALES)})\b)?"
NO_UNIT = rf"(?:or|and|to|pi|sqrt|times|plus|minus|over|mod|{'|'.join(SCALES)})\b"
UNITS = NormalizationConfig(basic_latex=True, units=True)


def plain(text):
    """A text in one spelling of signs, spaces, fractions and powers, without currencies, degrees and delimiters."""
    text = text.translate(SAME)
    for pattern, spelling in PLAIN:
        text = pattern.sub(spelling, text)
    return text.strip()


@functools.lru_cache(2**14)
def number(text):
    """(exact value, whether it is a percentage), or None where a text is no number. Units go as math-verify has them go."""
    if len(text) > LONGEST:
        return None
    spellings = (text, normalize_latex(text, UNITS), normalize_latex(plain(text), UNITS))
    words = next((words for words in map(plain, spellings) if re.fullmatch(NUMBER, words)), None)
    if words is None:
        return None
    size, scale = words.lstrip("+- "), next((power for word, power in SCALES.items() if word in words), 0)
    parts = reals(re.sub(r"(?<=\d) (?=\d)", "|", size))  # 1 1/2 is no 11/2
    whole, over, under = parts if "/" in size and len(parts) == 3 else (0, *reals(size), 1)[:3]
    if None in (whole, over, under) or not under:
        return None
    value = (whole + over / under) * 10**scale
    return -value if words[0] == "-" else value, "%" in words


def reals(text):
    return [real(part) for part in re.findall(rf"[+-]?\s*{REAL}", text)]


def real(text):
    """The value of a text that REAL describes, with its sign, or None beyond LARGEST."""
    text = re.sub(r"[\s,'_()]", "", text)
    size, *powers = re.fullmatch(r"[+-]?(.*?)(?:[*xX]?10\^([+-]?\d+)|(?<=[\d.])[eE]\{?([+-]?\d+)\}?)?", text).groups()
    power = int(next(filter(None, powers), 0))
    if abs(power) > LARGEST:
        return None
    if repeating := re.fullmatch(r"(\d*)\.(\d*)\\overline\{(\d+)\}", size):
        whole, head, cycle = repeating.groups()
        value = Fraction(int(whole + head + cycle) - int(whole + head or 0), 10 ** len(head) * (10 ** len(cycle) - 1))
    else:
        value = Fraction(size or 1)
    return (-value if text[0] == "-" else value) * Fraction(10) ** power


def same(gold, answer):
    """Whether two numbers as `number` gives them are equal; a percentage may be read as its hundredth, or without its sign."""
    (a, percent), (b, other) = gold, answer
    return near(a, b) or (percent != other and (near(a / 100, b) if percent else near(a, b / 100)))


def near(a, b):
    """Equal, but for a float's noise, or a fraction beside a decimal of at least six places that rounds it."""
    if a == b:
        return True
    places = [next((n for n in range(15) if 10**n % x.denominator == 0), None) for x in (a, b)]  # None: without an end
    known = [n for n in places if n is not None]
    if len(known) == 2:
        return False
    rounds = len(known) == 1 and known[0] >= 6 and abs(a - b) <= min(Fraction(1, 2 * 10 ** known[0]), abs(b) / 10**5)
    return rounds or abs(a - b) <= abs(b) / 10**14


# --- verdicts


def is_correct(gold, completion, finished=False, strict=False):
    """Whether a completion's final answer equals the gold one. `finished` and `strict` are those of final_answer."""
    answer = final_answer(completion, finished, strict)
    return answer is not None and equal(solution_answer(str(gold)), answer)


def solution_answer(text):
    r"""The answer of a gold solution: what its last \boxed{} holds, or what follows GSM8K's ####, or all of it."""
    return last_box(text)[1] or text.rsplit("####", 1)[-1].strip()


def gold_answer(value):
    """A problem's answer, a text or a number, as a text, without an exponent where it was a number; None: it is no answer."""
    text = f"{Decimal(repr(value)):f}" if isinstance(value, float) and math.isfinite(value) else str(value)
    answer = solution_answer(text)
    empty = not holds_something(answer) or answer.casefold() in ("nan", "inf", "-inf", "none", "null", "n/a", "na")
    return None if empty or not is_correct(answer, f"\\boxed{{{answer}}}") else answer


def equal(gold, answer):
    """Whether two answers are equal: numbers by `same`, words in any case, and the rest by math-verify."""
    if max(len(gold), len(answer)) > LONGEST:
        return False
    a, b = number(gold), number(answer)
    if (a is None) != (b is None):  # one of them may be "x = 5"
        a, b = a or number(right_side(gold)), b or number(right_side(answer))
    if a and b:
        return same(a, b)
    if wording(gold) and wording(gold) == wording(answer):
        return True
    p, q = parsed(gold), parsed(answer)
    return bool(verify(p, q)) and not far(p[0], q[0])


def right_side(text):
    """What an equation of one unknown says that it is, or the text."""
    parts = re.split(r"(?<![<>!\\:])=|\\approx|≈", text)
    return parts[-1] if len(parts) > 1 and not re.search(r"[,;]|\\pm|\bor\b|\band\b", "".join(parts[:-1])) else text


def wording(text):
    """The words of an answer that is nothing else, in lower case, or None."""
    text = plain(text).strip("() ")
    return text.casefold() if re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", text) else None


@functools.lru_cache(2**14)
def parsed(text):
    """What math-verify reads, a list. Exponents are written as it knows them."""
    text = text.translate(SAME).strip(" \t\n*_`$").rstrip(" .,;:")
    text = re.sub(r"(?<![A-Za-z\\])(\d\.?)[eE]([+-]?\d+)", r"\1 \\times 10^{\2}", text)
    return parse(f"\\boxed{{{text}}}") if len(text) <= LONGEST else []


def far(p, q):
    """Whether two numbers that are equal to six decimals are not so in their digits."""
    if p == q or not all(isinstance(x, Basic) and x.is_number for x in (p, q)):
        return False
    p, q = (x.doit().evalf() for x in (p, q))
    return not any(abs(p * factor - q) <= abs(q) / 10**5 for factor in (1, 100, 0.01))  # a percentage is read either way


def vote(row, strict=False):
    """What a rollout's answer is counted as, where equal ones are counted together, or None where it could not be parsed."""
    answer = final_answer(row["completion"], row["finished"], strict)
    if answer is None or len(answer) > LONGEST:
        return None
    expressions = [str(x) for x in parsed(answer) if isinstance(x, Basic | MatrixBase)]
    return number(answer) or wording(answer) or next(iter(expressions), None)
