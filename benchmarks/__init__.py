"""Programs that measure, side by side in one run, and write JSON to benchmarks/results/."""
