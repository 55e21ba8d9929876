"""A small GPT-2 with hand-written weights: four known heads make it continue "... A B ... D C ... A" with B.

The mechanism is the induction circuit of Elhage et al. 2021 ("A Mathematical Framework for Transformer Circuits",
"Induction heads"), with a second mover and a mover that works against the answer added:

    layer 0   previous-token head   writes into every position which token stands before it
    layer 1   name mover            from the last A to the position whose previous token is A; copies B to the output
    layer 2   name mover            the same, weaker
    layer 2   negative mover        the same, with the opposite sign

The residual stream has four orthogonal subspaces: token, previous token, position, output. Small random noise is added
to all weights, those of the planted heads included, so that no other head or MLP has exactly zero effect; none of them
has a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from vesalius.model import Model
from vesalius.site import Site

VOCAB, LAYERS, HEADS, D_MODEL, D_HEAD = 64, 3, 4, 64, 16
CODE, POSITIONS = 16, 28
"""Dimensions of a token's code, and how many positions the model has."""

PLANTED: Mapping[str, tuple[Site, ...]] = MappingProxyType(
    {
        "previous-token": (Site("z", 0, 1),),
        "name mover": (Site("z", 1, 2), Site("z", 2, 3)),
        "negative mover": (Site("z", 2, 0),),
    }
)
"""Ground truth: role -> the heads that have it. No other head and no MLP has a role."""

STRENGTHS: Mapping[Site, float] = MappingProxyType({Site("z", 1, 2): 1.0, Site("z", 2, 3): 0.3, Site("z", 2, 0): -0.4})
"""What each mover writes, as a multiple of `SIZE`. Without the first, the others together do not favour the answer."""

SIZE = 4.0
"""Norm of every planted vector in the residual stream, so that layer norm scales all prompts alike."""
SHARPNESS = 11.0
"""Score of a planted head's target above that of unrelated keys: enough for an attention of about .99."""
NOISE = 0.03
"""Standard deviation of the noise on each weight. A head of noise alone writes vectors of norm about 0.2."""
READOUT = 2.5
RANDOM_SCALE = D_MODEL**-0.5
"""Standard deviation of a random model's weights: attention scores and logits of standard deviation about 1."""


def planted_induction(seed: int = 0) -> Model:
    """The network above. seed: for the basis of the residual stream, the tokens' codes and the noise.

    Takes token ids below `VOCAB` and prompts of up to `POSITIONS` tokens; `planted_pairs` makes them.
    """
    generator = torch.Generator().manual_seed(seed)
    module = _network()
    _randomise(module, generator, NOISE)
    _plant(module, generator)
    return Model(module, name=f"planted-induction-{seed}")


def random_model(seed: int = 0) -> Model:
    """The same architecture with random weights: no mechanism. Embeddings are as large as a layer's output."""
    module = _network()
    _randomise(module, torch.Generator().manual_seed(seed), RANDOM_SCALE)
    with torch.no_grad():
        for table in (module.transformer.wte.weight, module.transformer.wpe.weight):
            table.mul_(0.5 / RANDOM_SCALE)
    return Model(module, name=f"random-{seed}")


def _network() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    # transformers draws initial weights from the global generator; they are all replaced, and its state is put back.
    with torch.random.fork_rng(devices=[]):
        return GPT2LMHeadModel(config).eval()


def _randomise(module: GPT2LMHeadModel, generator: torch.Generator, scale: float) -> None:
    """Matrices normal with this standard deviation, biases 0; layer norms are left at gain 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _plant(module: GPT2LMHeadModel, generator: torch.Generator) -> None:
    token, previous, output, position = _subspaces(generator)
    codes = _codes(generator)
    places, step = _places()
    with torch.no_grad():
        module.transformer.wte.weight.add_(SIZE * codes @ token)
        module.transformer.wpe.weight.add_(SIZE * places @ position)
        module.lm_head.weight.add_(READOUT * codes @ output)
        _set_head(module, PLANTED["previous-token"][0], query=step @ position, key=position, value=token, out=previous)
        for part, strength in STRENGTHS.items():
            _set_head(module, part, query=token, key=previous, value=token, out=strength * output)


def _set_head(module: GPT2LMHeadModel, part: Site, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Add a head's mechanism. query, key, value: directions [k, d_model] it reads, row by row; out: those it writes."""
    assert part.layer is not None and part.index is not None
    attention = module.transformer.h[part.layer].attn
    # Layer norm gives its output the norm sqrt(d_model), which the 2 + layer planted vectors present share.
    size = (D_MODEL / (2 + part.layer)) ** 0.5
    sharp = (SHARPNESS * D_HEAD**0.5) ** 0.5 / size
    start = part.index * D_HEAD
    for number, (rows, scale) in enumerate(((query, sharp), (key, sharp), (value, 1.0))):
        columns = number * D_MODEL + start
        attention.c_attn.weight[:, columns : columns + len(rows)] += scale * rows.T
    attention.c_proj.weight[start : start + len(out)] += SIZE / size * out


def _subspaces(generator: torch.Generator) -> tuple[Float[Tensor, "k d_model"], ...]:
    """Orthonormal rows of the subspaces token, previous, output (16 each) and position (14).

    In a random basis, and orthogonal to the vector of ones, which layer norm takes out.
    """
    start = torch.randn(D_MODEL, D_MODEL, generator=generator)
    start[:, 0] = 1
    basis = torch.linalg.qr(start).Q[:, 1:].T
    return tuple(basis[: 3 * CODE + POSITIONS // 2].split([CODE, CODE, CODE, POSITIONS // 2]))


def _codes(generator: torch.Generator) -> Float[Tensor, "vocab code"]:
    """64 unit vectors in 16 dimensions with no cosine above 1/4: plus and minus two mutually unbiased bases."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < CODE:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    both = torch.cat([torch.eye(CODE), hadamard / CODE**0.5])
    return torch.cat([both, -both])[torch.randperm(VOCAB, generator=generator)]


def _places() -> tuple[Float[Tensor, "pos half"], Float[Tensor, "half half"]]:
    """Codes of positions, plus and minus one basis, and the matrix that takes a position's code to the one before.

    Used as `step @ position` for the query: place[p] @ position.T picks out p, and step moves it to p - 1.
    """
    half = POSITIONS // 2
    places = torch.cat([torch.eye(half), -torch.eye(half)])
    # Row p of `before` is the code of position p - 1; position 0 would continue from minus the last one.
    before = torch.cat([-places[half - 1 : half], places[: half - 1]])
    return places, before.T
