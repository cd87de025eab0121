"""A look at a finished file: its contents, its neighbours, its map."""
