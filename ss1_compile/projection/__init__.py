"""From a dense weight to the z, and the learned sketch, that take its place."""
