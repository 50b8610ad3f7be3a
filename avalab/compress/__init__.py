"""A smaller artefact."""
