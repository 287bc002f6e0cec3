"""Side-by-side timings of SVI steps: `python -m benchmarks --help`."""
