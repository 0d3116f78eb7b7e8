"""What can be asked from the command line? One command per question; environment variables are read here alone."""
