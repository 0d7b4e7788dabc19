"""What a model's inputs say about each of its layers."""
