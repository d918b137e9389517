"""Operations of moe_runtime, each with a PyTorch reference that is also its CPU path."""
