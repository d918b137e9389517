"""The three set-ups of FLAN-MoE, beside a dense twin: task tuning, instruction tuning, and both in turn."""
