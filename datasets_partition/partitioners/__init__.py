"""Which client each row belongs to."""
