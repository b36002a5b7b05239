"""Stores rows by key, in memory and on disk. Nothing here depends on modules or calls."""
