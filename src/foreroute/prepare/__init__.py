"""What is prepared once beside a checkpoint? Packed stores, fitted predictors and their scores."""
