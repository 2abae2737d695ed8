"""A checkpoint's GPT over the processes, and its log-probabilities of completions."""

import functools

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from model import shared_prefix

from .chunked import chunked_logps
from .load_hf import fill, find_tensors
from .published import empty_model, gpt_config


def build(args, folder, mesh):
    """The checkpoint's GPT, its parameters sharded over the processes, each of which reads its own part."""
    model = empty_model(gpt_config(folder))
    places = find_tensors(folder, model)
    lower = torch.bfloat16 if args.precision == "bf16" else None
    # inputs are not cast: the rotary table stays fp32, and the embedding's output has the parameters' type already
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        if args.recompute:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=mesh.device_type)
    fill(model, places)
    model.folder = folder
    return model


def head_of(model):
    """The output weights (V, D)."""
    return model.embed_tokens.weight if model.config.tied_head else model.lm_head.weight


def completion_hidden(model, tokens, mask):
    """Hidden states (N, D) that predict the completion tokens of tokens (B, T), row by row, and these tokens (N,).

    What all rows begin with, such as worked examples or one problem, is computed once where that saves much.
    """
    first = mask.int().argmax(-1).min().item()  # of the completions' tokens
    shared = shared_prefix(tokens, first - 1)
    targets = mask[:, shared + 1 :]
    return model.hidden(tokens, shared=shared)[:, :-1][targets], tokens[:, shared + 1 :][targets]


def logp_sums(hidden, head, targets, mask, *reference):
    """logp_sum (B,) under the present and the future policy; `reference`: chunked_logps' last three arguments, or none."""
    rows, zeros = mask[:, 1:].nonzero()[:, 0], torch.zeros(len(mask), device=hidden.device)
    return [zeros.index_add(0, rows, logps) for logps in chunked_logps(hidden, head, targets, *reference)]
