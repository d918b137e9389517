"""Speed, memory and FLOPs against dense baselines and peers: `python -m benchmarks`. Never installed."""
