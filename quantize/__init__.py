"""Floor 3: 16-bit weights in, 4-bit files out, with the loss measured."""
