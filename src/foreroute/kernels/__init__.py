"""How are experts computed? The maths of one expert or many, on the CPU and on the GPU."""
