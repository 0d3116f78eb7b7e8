"""What is a model's output worth? Tasks with one right answer, and bits per character on held-out text."""
