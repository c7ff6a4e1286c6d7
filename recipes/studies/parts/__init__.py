"""Parts of the studies: methods, runs, tuning, the store of results, tables and pictures."""
