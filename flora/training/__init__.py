"""Many adapters trained at once, each row of a batch for its own."""
