"""What import is made of: what is in the source, which of its rows are whose, and the file that follows from both."""
