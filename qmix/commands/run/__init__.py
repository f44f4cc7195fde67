"""`qmix run`: command.py has the flags, proposal.py says what would be done and how long it takes, making.py does it,
library.py remembers what each store was made of."""
