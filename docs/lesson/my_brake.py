"""A brake to begin with: Off-RL's weight, less where an incorrect row has fallen since the base model."""


def brake(pi, pi_ref):
    return pi * (pi / pi_ref) ** 2
