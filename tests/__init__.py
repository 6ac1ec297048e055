"""The tests: one file per module, and a slow, obvious reference implementation."""
