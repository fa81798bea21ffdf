"""Floor 2: token ids in, tokens out. Knows nothing of HTTP, of chat roles, or of `<think>`."""
