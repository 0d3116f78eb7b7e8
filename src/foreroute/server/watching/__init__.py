"""What people watch: the live page, its feed, and metrics."""
