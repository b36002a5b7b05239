"""Many small models trained as one batched model: an empty room for now."""
