"""Matrix products with packed weights: which kernel runs when is `table.py`'s choice."""
