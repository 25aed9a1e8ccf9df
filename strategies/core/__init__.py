"""The protocol of strategies and what they share."""
