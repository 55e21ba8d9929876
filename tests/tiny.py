"""Tiny random models of every family with an adapter: for parity tests, seconds on a CPU, no download."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import vesalius as vs

VOCAB = 61


def llama(seed: int = 0, layers: int = 3, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6,
             "num_key_value_heads": 2}  # fmt: skip
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, initializer_range=0.2,
                         bos_token_id=0, eos_token_id=1, **{**sizes, **changes})  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0, layers: int = 3, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_layer=layers, n_embd=48, n_head=4, n_positions=64, initializer_range=0.2,
                        bos_token_id=0, eos_token_id=1, **changes)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


FAMILIES = {"llama": llama, "gpt2": gpt2}


def model(family: str, seed: int = 0, layers: int = 3) -> vs.Model:
    return vs.Model(FAMILIES[family](seed, layers))


def pairs(n: int = 6, seed: int = 0, width: int = 9) -> vs.Pairs:
    """Random pairs of unequal lengths that differ from position 2 or 3 on, at one or two positions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(2, VOCAB, (n, width), generator=generator)
    lengths = torch.randint(width - 3, width + 1, (n,), generator=generator)
    corrupted = clean.clone()
    for row in range(n):
        for at in (2 + row % 2, 4):
            corrupted[row, at] = (clean[row, at] - 2 + 7) % (VOCAB - 2) + 2
    answer = torch.randint(2, VOCAB, (n,), generator=generator)
    return vs.Pairs(clean=clean, corrupted=corrupted, answer=answer, distractor=(answer + 1) % VOCAB, lengths=lengths)
