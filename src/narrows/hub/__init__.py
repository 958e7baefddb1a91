"""Models by their name: narrows' own, timm's, transformers', or a folder."""
