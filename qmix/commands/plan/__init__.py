"""`qmix plan`: command.py has the flags, report.py works out what it prints."""
