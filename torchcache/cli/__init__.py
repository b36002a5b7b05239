"""The command line: what an operator asks of cache directories, and their maintenance."""
