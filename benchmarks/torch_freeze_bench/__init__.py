"""What `benchmarks/compare.py` is made of: contestants, measures, suites and reports."""
