"""What each level of access to a base costs its clients: one recipe, a run for each level, one comparison."""
