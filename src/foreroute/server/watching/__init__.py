"""What a person sees: the live page, its feed, and metrics."""
