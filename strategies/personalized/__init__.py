"""Rules that give clients models of their own."""
