"""Files of other tools: written, read, and replaced."""
