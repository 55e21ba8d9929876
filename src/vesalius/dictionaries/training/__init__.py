"""Fitting dictionaries: one loop for all kinds, with sparse products where activations are sparse."""
