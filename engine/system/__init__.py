"""Files, memory and failures of processes."""
