"""`moe-runtime profile`: where the time and memory of a causal LM go, beside what it could run on instead."""
