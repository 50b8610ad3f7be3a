"""Images beside text: a small image tower that learns to point where a frozen language model points."""
