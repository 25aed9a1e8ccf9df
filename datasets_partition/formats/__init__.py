"""Rows as people have them, made canonical."""
