"""Evaluate a model's output: tasks with one right answer, and bits per character on held-out text."""
