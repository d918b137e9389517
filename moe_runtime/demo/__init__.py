"""The demonstration: a real dense checkpoint becomes MoE and BAM models, measured against dense ones."""
