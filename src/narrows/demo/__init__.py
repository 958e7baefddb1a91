"""Models that narrows trains itself, so that every command runs without a download."""
