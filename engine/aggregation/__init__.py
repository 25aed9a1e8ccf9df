"""Sums of updates: exact, in a ring, and what noise on them costs."""
