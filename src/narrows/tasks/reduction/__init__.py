"""Token reduction put into a model people have: opened, measured side by side, reported, fine-tuned."""
