"""Models that answer people and programs."""
