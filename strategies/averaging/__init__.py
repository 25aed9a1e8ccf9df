"""Rules that average the clients' changes."""
