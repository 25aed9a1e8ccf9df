"""The contract that every strategy keeps."""
