"""Which of several runs is better, on the same rows: of this package, and of predictions that other tools made."""
