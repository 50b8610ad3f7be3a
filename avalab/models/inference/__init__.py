"""Layers that stay packed in memory, and the step that decodes one token with them."""
