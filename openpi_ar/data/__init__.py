"""Raw samples and observations to the arrays a model reads: robots, normalisation, batches."""
