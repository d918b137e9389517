"""`moe-runtime stats` and `expert_stats`: what routers and experts of a model do with text."""
