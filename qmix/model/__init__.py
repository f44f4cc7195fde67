"""The forward pass: one file per architecture, and what several of them share."""
