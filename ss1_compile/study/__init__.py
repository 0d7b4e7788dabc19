"""Size, latency and quality over reductions and methods, and the page that shows them."""
