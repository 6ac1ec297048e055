"""Ratios to the alternatives, measured in one interleaved run."""
