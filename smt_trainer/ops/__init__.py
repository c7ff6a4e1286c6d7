"""The autograd operations that training spends its time in."""
