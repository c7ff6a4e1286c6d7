"""A delta and the files of a checkpoint: merge it, take it out again, prove what is there."""
