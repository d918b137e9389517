"""Training on several processes: data parallel by FSDP2, expert parallel, and checkpoints of both."""
