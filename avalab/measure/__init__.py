"""What an artefact is worth."""
