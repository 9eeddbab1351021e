"""One command for the minutes in which a GPU is at hand: right, fast, training, and a real run."""
