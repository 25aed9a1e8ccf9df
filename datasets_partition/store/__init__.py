"""The client store: built once, mapped by all."""
