"""Learning which of two answers is the better one: the losses, the pairs, and the training."""
