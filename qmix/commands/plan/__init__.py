"""`qmix plan`: command.py has its flags, report.py what it prints."""
