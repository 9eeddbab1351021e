"""Is a checkpoint what it should be? Goldens of reference code, and comparisons."""
