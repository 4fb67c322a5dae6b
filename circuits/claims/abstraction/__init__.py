"""Causal abstraction: whether a model computes what a person's algorithm computes, variable by variable."""
