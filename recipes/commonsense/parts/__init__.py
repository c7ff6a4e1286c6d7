"""What the fine-tuning script is made of: data, prompts, batches, evaluation and report."""
