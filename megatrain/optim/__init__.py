"""Floor 3: optimisers, learning-rate schedules, and the gradient norm of a model that is spread over ranks."""
