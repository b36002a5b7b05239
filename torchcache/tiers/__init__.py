"""Rows by key, in memory and on disk; nothing here knows a module or a call."""
