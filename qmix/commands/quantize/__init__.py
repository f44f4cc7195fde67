"""`qmix quantize`: command.py has its flags, calibration.py the text that it may read."""
