"""How well a causal LM does: perplexity of texts, and tasks from JSON lines."""
