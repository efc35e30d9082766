"""What is kept. No torch."""
