"""Model families: a file and a row of a table each; and the packed forward, weights, pooling and scores they share."""
