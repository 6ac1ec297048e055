"""The tests: one file per module, and the slow and obvious version they believe."""
