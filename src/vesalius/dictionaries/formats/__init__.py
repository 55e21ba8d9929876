"""Files of dictionaries, one library a file: recognised by what is there, read, and written where that is possible."""

from __future__ import annotations

from vesalius.dictionaries.formats import (
    circuit_tracer,
    crosscoder_learning,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    openmoss,
    pickles,
    saelens,
    saelens_write,
    sparsify,
)
from vesalius.dictionaries.formats.base import Format, Found, Options

FORMATS = (
    # Before SAELens, which calls its weights the same.
    Format("openmoss", "hyperparams.json, or config.json and sae_weights.safetensors", openmoss.claims, openmoss.read,
           options=("in_scale",)),
    Format("saelens", "cfg.json and sae_weights.safetensors", saelens.claims, saelens.read, saelens_write.write,
           ("in_scale",)),
    Format("sparsify", "cfg.json and sae.safetensors", sparsify.claims, sparsify.read, sparsify.write),
    Format("dictionary_learning", "config.json and ae.pt or ae_<step>.pt", dictionary_learning.claims,
           dictionary_learning.read),
    Format("crosscoder_learning", "model.safetensors", crosscoder_learning.claims, crosscoder_learning.read),
    Format("gemma_scope", "params.npz", gemma_scope.claims, gemma_scope.read, gemma_scope.write),
    Format("gemma_scope_2", "params.safetensors", gemma_scope_2.claims, gemma_scope_2.read, gemma_scope_2.write),
    Format("gemma_scope_2", "*layer_<n>.safetensors of a cross-layer transcoder", gemma_scope_2.claims_cross_layer,
           gemma_scope_2.read_cross_layer),
    Format("circuit_tracer", "W_enc_<n>.safetensors and W_dec_<n>.safetensors", circuit_tracer.claims_cross_layer,
           circuit_tracer.read_cross_layer, circuit_tracer.write),
    Format("circuit_tracer", "layer_<n>.safetensors", circuit_tracer.claims, circuit_tracer.read),
    Format("pickled", pickles.HOLDS, pickles.claims, pickles.read, options=("k", "row_norm")),
)  # fmt: skip
"""In the order in which they are tried."""
WRITERS = {known.name: known.write for known in FORMATS if known.write is not None}
READ_ONLY = tuple(sorted({known.name for known in FORMATS} - set(WRITERS)))

PICKLED = pickles.SUFFIXES
"""What the names of single files end in that are read when they are given by name."""

__all__ = ["FORMATS", "PICKLED", "READ_ONLY", "WRITERS", "Format", "Found", "Options"]
