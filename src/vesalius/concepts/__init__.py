"""From a concept to a direction or subspace."""
