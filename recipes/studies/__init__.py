"""Studies of what learns better: one harness for every method, task and seed."""
