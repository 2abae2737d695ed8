"""The toy task: two-digit arithmetic with step-by-step traces, slips, a tokenizer, a verifier and rollouts."""
