"""The door that swaps the linear modules of a model."""
