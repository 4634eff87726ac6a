"""Programs that measure tok1d; run them from the repository root as ``python -m benchmarks.NAME``."""
