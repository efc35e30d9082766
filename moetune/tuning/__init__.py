"""From a question to a profile: what a tune does, bucket by bucket."""
