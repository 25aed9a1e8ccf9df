"""Which worker does what, when and where."""
