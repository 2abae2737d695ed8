"""The toy task: two-digit arithmetic with step-by-step traces, mistakes, a tokenizer, a verifier and rollouts."""
