"""From a GGUF file to a folder in transformers layout; what is not fully understood is refused."""

from __future__ import annotations

from vesalius.model.gguf.architecture import ARCHITECTURES
from vesalius.model.gguf.convert import convert_gguf
from vesalius.model.gguf.tokenizer import read_tokenizer

__all__ = ["ARCHITECTURES", "convert_gguf", "read_tokenizer"]
