"""The demonstration: a real dense checkpoint becomes MoE and BAM models, tuned, generating, measured against dense."""
