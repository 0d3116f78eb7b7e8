"""The command line: one command per question. Environment variables are read here alone."""
