"""Where experts live and how they are found: placement plan and the provider that the model calls."""
