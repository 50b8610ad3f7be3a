"""AVA Lab: how small and fast a language model gets before it stops being good."""

from avalab.lab import process  # noqa: F401  before any library that it silences
