"""Files of dictionaries, one library a file: recognised by what is there, read, and written where that is possible."""

from __future__ import annotations

from vesalius.dictionaries.formats import (
    circuit_tracer,
    crosscoder_learning,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    openai,
    saelens,
    saelens_write,
    sparsify,
)
from vesalius.dictionaries.formats.base import Format, Found, Options

FORMATS = (
    Format("saelens", "cfg.json and sae_weights.safetensors", saelens.claims, saelens.read, saelens_write.write),
    Format("sparsify", "cfg.json and sae.safetensors", sparsify.claims, sparsify.read, sparsify.write),
    Format("dictionary_learning", "config.json and ae.pt", dictionary_learning.claims, dictionary_learning.read),
    Format("crosscoder_learning", "model.safetensors", crosscoder_learning.claims, crosscoder_learning.read),
    Format("gemma_scope", "params.npz", gemma_scope.claims, gemma_scope.read, gemma_scope.write),
    Format("gemma_scope_2", "params.safetensors", gemma_scope_2.claims, gemma_scope_2.read, gemma_scope_2.write),
    Format("gemma_scope_2", "*layer_<n>.safetensors of a cross-layer transcoder", gemma_scope_2.claims_cross_layer,
           gemma_scope_2.read_cross_layer),
    Format("circuit_tracer", "W_enc_<n>.safetensors and W_dec_<n>.safetensors", circuit_tracer.claims_cross_layer,
           circuit_tracer.read_cross_layer, circuit_tracer.write),
    Format("circuit_tracer", "layer_<n>.safetensors", circuit_tracer.claims, circuit_tracer.read),
    Format("openai", "a .pt file", openai.claims, openai.read),
)  # fmt: skip
"""In the order in which they are tried."""
WRITERS = {known.name: known.write for known in FORMATS if known.write is not None}
READ_ONLY = tuple(sorted({known.name for known in FORMATS} - set(WRITERS)))

__all__ = ["FORMATS", "READ_ONLY", "WRITERS", "Format", "Found", "Options"]
