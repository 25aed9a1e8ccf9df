"""Rules that withstand clients that lie."""
