"""Merge a delta into the files of a checkpoint, take it out again, prove that it is there."""
