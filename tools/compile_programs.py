"""Compile RASP programs to small transformers and write their weights where `vesalius.toys.compiled` reads them.

Needs an environment of its own, because the compiler (Lindner et al. 2023, "Tracr") stands on JAX:

    python -m venv /tmp/tracr && /tmp/tracr/bin/pip install jax dm-haiku chex networkx einops
    /tmp/tracr/bin/pip install --no-deps tracr-pypi
    /tmp/tracr/bin/python tools/compile_programs.py src/vesalius/toys/programs

The files hold plain arrays. `check_*` are the compiled network's own outputs on a few inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

LENGTH = 5
PROGRAMS = {
    "reverse": (lambda: lib.make_reverse(rasp.tokens), {1, 2, 3}),
    "frac_prevs": (lambda: lib.make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y", "z"}),
    "sort": (lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=LENGTH, min_key=1), {1, 2, 3, 4, 5}),
    "sort_unique": (lambda: lib.make_sort_unique(rasp.tokens, rasp.tokens), {1, 2, 3, 4, 5}),
    "length": (lambda: lib.make_length(), {1, 2, 3}),
    "hist": (lambda: lib.make_hist(), {1, 2, 3}),
    "pair_balance": (lambda: lib.make_pair_balance(rasp.tokens, "(", ")"), {"(", ")"}),
}


def arrays(name: str) -> dict[str, np.ndarray]:
    """Everything a network needs, by name."""
    make, vocabulary = PROGRAMS[name]
    program = make()
    model = compiling.compile_rasp_to_model(
        program, vocab=vocabulary, max_seq_len=LENGTH, causal=False, compiler_bos="BOS"
    )
    params, encoding = model.params, model.input_encoder.encoding_map
    found = {
        "token_embed": params["token_embed"]["embeddings"],
        "pos_embed": params["pos_embed"]["embeddings"],
        "unembed": unembedding(model, program.label),
        "tokens": np.array([str(token) for token, _ in sorted(encoding.items(), key=lambda item: item[1])]),
        "labels": np.array(model.residual_labels),
        "heads": np.array(model.model_config.num_heads),
    }
    for layer in range(model.model_config.num_layers):
        for part in ("query", "key", "value", "linear"):
            found |= both(f"{layer}.{part}", params[f"transformer/layer_{layer}/attn/{part}"])
        for number in (1, 2):
            found |= both(f"{layer}.mlp_{number}", params[f"transformer/layer_{layer}/mlp/linear_{number}"])
    sequences = inputs(sorted(vocabulary))
    found["check_ids"] = np.array([[encoding["BOS"], *(encoding[token] for token in row)] for row in sequences])
    outputs = [np.asarray(model.apply(["BOS", *row]).transformer_output)[0] for row in sequences]
    found["check_outputs"] = np.stack(outputs)
    kept = {key: np.asarray(value) for key, value in found.items()}
    return {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in kept.items()}


def unembedding(model: Any, label: str) -> np.ndarray:
    """[output, d_model]: the residual dimensions of a categorical result, or a numerical one and a zero beside it."""
    labels = list(model.residual_labels)
    rows = [number for number, name in enumerate(labels) if name == label or name.startswith(f"{label}:")]
    matrix = np.zeros((max(2, len(rows)), len(labels)), dtype=np.float32)
    matrix[range(len(rows)), rows] = 1
    return matrix


def both(name: str, given: dict[str, Any]) -> dict[str, np.ndarray]:
    return {f"{name}.weight": given["w"], f"{name}.bias": given["b"]}


def inputs(vocabulary: list[Any]) -> list[list[Any]]:
    """Four inputs of full length."""
    random = np.random.default_rng(0)
    return [[vocabulary[n] for n in random.integers(len(vocabulary), size=LENGTH)] for _ in range(4)]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        made = arrays(name)
        np.savez_compressed(folder / f"{name}.npz", **made)
        print(name, sum(array.size for key, array in made.items() if "." in key), "weights in the layers")


if __name__ == "__main__":
    main()
