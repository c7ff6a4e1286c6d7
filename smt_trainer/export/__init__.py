"""Export for other programs: LoRA adapters for PEFT, weight patches for inference servers."""
