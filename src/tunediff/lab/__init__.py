"""The lab tests whether tunediff is right: organisms with planted behaviors, nulls and benchmarks."""
