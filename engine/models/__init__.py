"""Base models, what is trained of them, and their export."""
