"""What the studies are made of: methods, runs, tuning, the store of results, tables and pictures."""
