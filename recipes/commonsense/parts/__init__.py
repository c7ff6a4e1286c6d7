"""Parts of the commonsense task: data, answers and their metric."""
