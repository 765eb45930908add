"""Text to batches: shards, documents, the tokenizer, the one order of the data, packing, batches, the feed."""
