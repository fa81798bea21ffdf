"""Floor 3: a small model learns from rewards that can be checked. Imports `r1/` and `backends/`, nothing beside it."""
