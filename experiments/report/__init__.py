"""Pages about runs, and pictures of stores."""
