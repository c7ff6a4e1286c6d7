"""Read a plain model: its names, targets and grids, what is trained whole, and the base that it was loaded from."""
