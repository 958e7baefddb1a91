"""Side-by-side timings against the packages people use today."""
