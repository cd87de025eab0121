"""The machine itself: a check of what a run would find, and weights ahead of time."""
