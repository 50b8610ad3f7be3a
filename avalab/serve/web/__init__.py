"""OpenAI's interface over HTTP, with figures, logs and limits."""
