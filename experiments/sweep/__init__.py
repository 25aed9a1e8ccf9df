"""Several runs from one recipe, each an ordinary run folder."""
