"""Decisions under uncertainty that know nothing of models: whom to measure further, and when to stop."""
