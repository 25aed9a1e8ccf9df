"""Conversion of users' rows to the canonical formats."""
