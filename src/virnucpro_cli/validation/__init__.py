"""What `validate` is made of: the oracle's rows, how they agree with ours, the gates, and the verdict."""
