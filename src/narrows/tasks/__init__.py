"""What is trained and compared: classification for Lightning, the comparison and its report, pictures of a model."""
