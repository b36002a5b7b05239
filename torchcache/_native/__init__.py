"""The compiled library: how it is found or built, and its operations."""
