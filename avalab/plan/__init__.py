"""Which artefact under which budget, and the way there."""
