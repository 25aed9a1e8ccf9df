"""Rules that know about low-rank adapters."""
