"""The commands of `qmix`, a file or a folder each: what a command takes, and what only it does.

Shared by several: options.py has their flags, loading.py makes an engine from them, prompt.py reads the text that a
command is given, oneshot.py answers one prompt, interrupt.py handles Ctrl-C, routing.py words what routers chose.
"""
