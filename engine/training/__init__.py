"""What one client does on its rows."""
