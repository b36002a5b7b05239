"""One call, from its arguments to its output: what its keys are, which rows a tier has, and what must be computed."""
