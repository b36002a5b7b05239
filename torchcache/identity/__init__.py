"""What makes two computations the same: code, configuration, weights and random numbers, as bytes."""
