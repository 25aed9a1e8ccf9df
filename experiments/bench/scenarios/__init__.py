"""One benchmark a file; its `measure` gives the figures."""
