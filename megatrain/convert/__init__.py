"""Floor 5: models from and to other projects' formats, each conversion checked by the logits of both sides."""
