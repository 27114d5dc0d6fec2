"""The tiny pair: architectures small enough for two CPU cores, and their pretraining on the toy world."""
