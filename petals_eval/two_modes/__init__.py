"""The two modes of a model, seen: what `eval()` and the absence of gradients change in its answers."""
