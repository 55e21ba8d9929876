"""Inputs: Tokens (one batch of text), Raw (images and other floats), and Pairs of clean and corrupted ones."""

from vesalius.inputs.pairs import LOGITS, Pairs
from vesalius.inputs.raw import Inputs, Raw
from vesalius.inputs.tokens import Tokens, check_named_positions, pad_rows

__all__ = ["LOGITS", "Inputs", "Pairs", "Raw", "Tokens", "check_named_positions", "pad_rows"]
