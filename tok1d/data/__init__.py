"""Photos from folders and WebDataset shards."""
