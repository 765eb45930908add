"""Floor 5: text from a trained model: load a checkpoint, continue prompts, search for the most probable text."""
