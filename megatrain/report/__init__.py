"""A run's files -> one page that needs nothing else: curves, events, facts."""
