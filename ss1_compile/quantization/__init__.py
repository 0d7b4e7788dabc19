"""Int8 and fp8 z: rounding it, and what that costs."""
