"""Which tokens may come next, how many of them are drafted, and how does the model verify them?"""
