"""Whoever completes sequences for the learner: the embedded engine, and the protocol others follow."""
