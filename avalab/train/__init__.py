"""A better artefact."""
