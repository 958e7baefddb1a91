"""What a module costs: multiply-accumulates with the tokens really kept, memory, speed."""
