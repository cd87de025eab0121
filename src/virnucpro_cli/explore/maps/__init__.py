"""Pictures of where the rows lie: projections onto a plane, colours, and the drawing (extra `maps`)."""
