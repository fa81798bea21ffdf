"""Floor 3: HTTP. Every JSON key lives here and nowhere else."""
