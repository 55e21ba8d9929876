"""From a GGUF file to a folder in transformers layout; what is not fully understood is refused."""

from __future__ import annotations

from vesalius.convert.architecture import ARCHITECTURES
from vesalius.convert.folder import convert_gguf
from vesalius.convert.tokenizer import read_tokenizer

__all__ = ["ARCHITECTURES", "convert_gguf", "read_tokenizer"]
