"""Speed, memory and FLOPs against dense baselines and peers. Run with `python -m benchmarks`; never installed."""
