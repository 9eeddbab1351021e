"""One training step and all around it: state, optimizer, sharding, checkpoints of the run, metrics."""
