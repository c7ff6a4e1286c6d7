"""Read a plain model: its grids, names, targets, and what is trained whole."""
