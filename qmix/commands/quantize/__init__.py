"""`qmix quantize`: command.py has the flags, calibration.py reads the text and chooses a mix. quantize/ beside
commands/ has the quantizer."""
