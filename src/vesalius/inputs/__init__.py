"""Inputs: Tokens (one batch of text), Raw (images and other floats), Pairs of clean and corrupted ones, Corpus,
Table of rows."""

from vesalius.inputs.corpus import Corpus
from vesalius.inputs.pairs import LOGITS, Pairs
from vesalius.inputs.raw import Inputs, Raw
from vesalius.inputs.table import Table
from vesalius.inputs.tokens import Tokens, check_named_positions, pad_rows

__all__ = ["LOGITS", "Corpus", "Inputs", "Pairs", "Raw", "Table", "Tokens", "check_named_positions", "pad_rows"]
