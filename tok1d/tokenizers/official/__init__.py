"""One readable key map per published family."""
