"""Dense checkpoints to Mixture-of-Experts checkpoints: sparse copy, Branch-Train-MiX, BAM."""
