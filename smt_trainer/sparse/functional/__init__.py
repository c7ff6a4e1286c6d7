"""The backward passes that form only the chosen parts of a weight gradient, as torch.nn.functional has the products."""
