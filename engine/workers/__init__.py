"""The actors that host clients."""
