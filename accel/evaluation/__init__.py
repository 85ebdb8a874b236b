"""Measures speed and quality: comparison, metrics, intervals, benchmark suites, reports and generated documents."""
