"""Axis legend and tensor aliases; every public signature uses these words.

    batch     examples run together          example   examples of a data set
    pos       token positions                head      query heads (kv_head: key-value heads)
    d_head    width of one head              d_model   width of the residual stream
    d_mlp     neurons of an MLP              vocab     output tokens
    query_pos, key_pos                       latent    units of a dictionary
    expert    experts of a mixture, per layer

Shapes are checked by beartype in the test run only; users pay nothing.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Ids = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
Logits = Float[Tensor, "batch pos vocab"]
Residual = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
Pattern = Float[Tensor, "batch head query_pos key_pos"]
PerExample = Float[Tensor, " batch"]
