"""What the task is made of: data, answers and their metric."""
