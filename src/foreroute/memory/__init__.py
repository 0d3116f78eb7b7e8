"""What fits in memory? Turns budgets of RAM, of a GPU and of a server into numbers of slots and tokens."""
