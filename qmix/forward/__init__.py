"""The forward pass of every architecture: one program of Ops a model, and what runs it."""
