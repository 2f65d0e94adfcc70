"""What a user gets: predictions, written and read back, and maps of them."""
