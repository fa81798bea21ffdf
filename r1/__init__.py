"""Floor 1: everything special about R1-distilled models. Imports no runtime."""
