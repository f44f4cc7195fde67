"""ollama's API, for clients that know only this: tags, show, version, chat, generate."""
