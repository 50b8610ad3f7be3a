"""A causal language model and its layers."""
