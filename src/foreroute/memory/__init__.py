"""What fits? Budgets of RAM, of a GPU and of a server, turned into numbers of slots and tokens."""
