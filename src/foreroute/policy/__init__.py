"""What is waited for? The rules of each policy, on plain lists: exact, tolerance, speculative, paper."""
