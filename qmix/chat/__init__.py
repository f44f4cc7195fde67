"""The chat in the terminal: the command line calls `run`.

repl.py is the loop and the only place that holds state. commands.py has the slash commands as data, conversation.py
what was said, immutable, savefile.py its JSON form, answer.py one turn through the generator. prompt.py is the input
line, signals.py Ctrl-C and termination, screen.py the two streams, statline.py the figures after an answer.
"""

from qmix.chat.repl import run

__all__ = ["run"]
