"""Distilled weights and how a pipeline runs them: manifest, scheduler, weight deltas, interval embedding."""
