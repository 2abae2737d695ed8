"""The toy's tokenizer: a `tiktoken.Encoding` over a small alphabet, built in place, one token a character.

BOS, EOS and PAD are three different tokens: EOS is a prediction like any other and is trained, PAD never is.
"""

import tiktoken

ALPHABET = "0123456789+-*=?;#"
SPECIAL = {"<bos>": len(ALPHABET), "<eos>": len(ALPHABET) + 1, "<pad>": len(ALPHABET) + 2}
BOS, EOS, PAD = SPECIAL.values()
VOCAB_SIZE = len(ALPHABET) + len(SPECIAL)

ENCODING = tiktoken.Encoding(
    name="toy_math",
    pat_str=r"[\s\S]",  # every character is a piece of its own, so nothing is ever merged
    mergeable_ranks={character.encode(): rank for rank, character in enumerate(ALPHABET)},
    special_tokens=SPECIAL,
    explicit_n_vocab=VOCAB_SIZE,
)


def encode(text):
    """Text -> list of token ids, no BOS or EOS added. Raises ValueError naming a character outside the alphabet."""
    for position, character in enumerate(text):
        if character not in ALPHABET:
            raise ValueError(f"character {character!r} at position {position} is not in the alphabet {ALPHABET!r}")
    return ENCODING.encode_ordinary(text)


def decode(tokens):
    """Token ids -> (text up to the first special token, True if that token is EOS)."""
    end = next((i for i, token in enumerate(tokens) if token >= BOS), len(tokens))
    return ENCODING.decode(tokens[:end]), end < len(tokens) and tokens[end] == EOS
