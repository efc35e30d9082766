"""What one rank's kernel will see."""
