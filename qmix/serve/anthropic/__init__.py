"""Anthropic's API: messages and count_tokens, as Claude Code speaks it."""
