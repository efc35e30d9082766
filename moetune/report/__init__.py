"""What a profile looks like to a person. From profiles alone, no torch."""
