"""Lab: is the tool right? Organisms, nulls, benchmarks."""
