"""Other people's trainers as hosts of this one: each drives the same data, losses and metrics by its own engine."""
