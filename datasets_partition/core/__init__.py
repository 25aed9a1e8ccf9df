"""The types that sources, partitioners and stores share."""
