"""Which layers to compress how much, for a budget or a quality."""
