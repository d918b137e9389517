"""`moe-runtime train`: fine-tune a Mixture-of-Experts model, or a dense one, from a recipe."""
