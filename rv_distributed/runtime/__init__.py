"""Workers and the two runtimes that drive them."""
