"""What others read: LoRA adapters of PEFT, weight patches of inference servers."""
